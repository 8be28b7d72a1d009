"""One command for a rented GPU: measures in minutes what decides, most valuable first, into one archive."""
