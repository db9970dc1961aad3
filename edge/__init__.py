"""What stands between the network and the routes: response headers, limits, connections."""
