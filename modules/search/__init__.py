"""Five searches over long histories (GSU): definition, CPU kernels, GPU kernel."""
