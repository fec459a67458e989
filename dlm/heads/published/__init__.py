"""Draft networks in the layouts of the public codes, a file each: `load` and `save`."""
