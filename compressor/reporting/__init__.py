"""Reports, tables, pages, plots, and the gate that holds reports against limits."""
