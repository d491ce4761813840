"""What the user gives is checked here, and what the user is told is told from here."""
