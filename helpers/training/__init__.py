"""Networks, images and the training loop, in one process or many."""
