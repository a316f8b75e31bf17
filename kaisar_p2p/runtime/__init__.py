"""Where tenants' programs run: Docker, or plain processes for development."""
