"""The Ray Serve application: `serve deploy serve/config.yaml`, or `make serve`."""
