"""What schemathesis doesn't know by itself: Glance's media type of a JSON patch, and that the document is about compute's
newest microversion."""

import json

import schemathesis


@schemathesis.serializer("application/openstack-images-v2.1-json-patch")
def json_patch(context, value):
    return json.dumps(value).encode()


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.path.startswith("/compute"):
        case.headers = {**(case.headers or {}), "OpenStack-API-Version": "compute 2.90"}
