"""Dense tasks of one image (classes, depth, surface normals), trained with every method."""
