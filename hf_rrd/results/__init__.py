"""After the run: measures, report, pictures, card, push and export."""
