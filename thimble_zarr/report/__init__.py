"""Results as text: tables for people, csv and json for machines. Nothing is computed here."""
