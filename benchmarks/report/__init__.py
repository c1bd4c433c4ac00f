"""Generated documents: pages whose figures come from ``benchmarks/results`` and whose keys come from the job models."""
