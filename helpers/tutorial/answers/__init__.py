"""The answers to the exercises, one module for each notebook; `exercises` reads them."""
