"""The five searches (GSU): definition, CPU kernels, GPU kernel."""
