"""Load and soak tests of the service, and what they deploy it with. The service itself knows nothing of them."""
