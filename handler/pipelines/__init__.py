"""What we know of diffusers' pipelines: their parameters, costs, schedulers and adapters."""
