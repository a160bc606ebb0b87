"""Report of a sweep as a single page: charts, table, timeline and provenance, in a file that needs no network."""
