"""Groups that train apart and are merged now and then (DiLoCo): the hub, the islands, and the files between them."""
