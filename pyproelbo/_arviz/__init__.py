"""What ArviZ asks of a fit."""
