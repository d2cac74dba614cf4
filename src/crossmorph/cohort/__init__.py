"""Many registrations: a table of pairs in, a folder of results and a table out, on one machine or a cluster."""
