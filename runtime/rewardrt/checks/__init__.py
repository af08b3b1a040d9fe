"""Whether it works here and how well: golden texts, the state of the machine, and speed."""
