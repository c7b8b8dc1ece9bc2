"""How all this is deployed, and seen: docs/kubernetes.md, docs/monitoring.md."""
