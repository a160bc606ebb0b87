"""Report of a sweep as a single page: charts, table, failures and provenance, in a file that needs no network."""
