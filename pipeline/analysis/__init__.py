"""Results to studies, tables, figures and the page."""
