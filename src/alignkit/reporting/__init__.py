"""The report: figures, tables and the page made of them."""
