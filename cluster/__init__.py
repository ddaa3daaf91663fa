"""Where the jobs run: cluster files for clouds, Kubernetes and own machines, and the watcher of spot notices."""
