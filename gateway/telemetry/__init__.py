"""What the gateway tells of itself: metrics, one log line a request, traces. Nothing of prompts."""
