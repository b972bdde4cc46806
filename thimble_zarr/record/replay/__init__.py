"""Steps that the writer thread takes again, from the rows in memory."""
