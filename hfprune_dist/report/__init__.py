"""A sweep as one page: charts, table, timeline and provenance in a file that needs no network."""
