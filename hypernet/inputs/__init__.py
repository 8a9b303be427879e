"""Photos: of the person to personalise on, and of the people of a data set, cut to their faces."""
