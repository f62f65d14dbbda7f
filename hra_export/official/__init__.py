"""Files of the authors' own code, and of what came after it: layouts, settings, and chains that are no HRA."""
