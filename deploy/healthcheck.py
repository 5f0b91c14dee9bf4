"""The container's health check: exit 0 if the server in it answers GET /health with 200."""

import http.client
import os
import sys


def main() -> int:
    """The exit code: 0 healthy, 1 not."""
    # Without urllib, which would ask a proxy that the environment names.
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("CHORUS_PORT") or 8000), timeout=4)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer: {error}")
        return 1
    finally:
        connection.close()
    print(f"status {status}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
