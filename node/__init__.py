"""Who a peer is: joins the protocols' machines with the adapters, and gives its owner an API and a command line."""
