"""Files of records, read to the letter."""
