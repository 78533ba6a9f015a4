"""What came out: arms compared from results alone, in tables, figures and the pages of evidence."""
