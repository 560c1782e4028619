"""What schemathesis doesn't know by itself: Glance's media type of a JSON patch."""

import json

import schemathesis


@schemathesis.serializer("application/openstack-images-v2.1-json-patch")
def json_patch(context, value):
    return json.dumps(value).encode()
