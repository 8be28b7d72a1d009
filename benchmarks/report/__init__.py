"""Records shown: tables, pictures, and a page of HTML."""
