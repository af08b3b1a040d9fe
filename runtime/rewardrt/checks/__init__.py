"""Does it work here, and how well: comparison with the golden texts, the state of the machine, and speed."""
