"""Storage tested on real object stores, each started here on loopback: `make test-s3`, `make test-cloud`.

Servers (`seaweedfs`, `azurite`, `fake_gcs`, `file_server`) and the proxy that breaks requests (`fault_proxy`)
are context managers that end by pid what they started. The tests are marked `lane` and run only where -m asks
for lanes; the proxy's own tests belong to the fast suite, in tests/test_fault_proxy.py.
"""
