"""What several tests share: tiny pipelines, toy archives, fake clocks, a stand-in for the hub."""
