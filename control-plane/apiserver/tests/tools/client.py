"""Uses an API server by the official Python client: `client.py URL`. Ends with status 0 if all is well."""

import base64
import datetime
import sys
import threading

from kubernetes import client, dynamic, watch
from kubernetes.client import ApiException
from kubernetes.client.exceptions import ApiException as TypedError
from kubernetes.dynamic.exceptions import ConflictError, NotFoundError, UnprocessibleEntityError

GROUP, VERSION = "exo.dev", "v1alpha1"
API = f"{GROUP}/{VERSION}"


def instance(name, replicas=1):
    return {
        "apiVersion": API,
        "kind": "InferenceInstance",
        "metadata": {"name": name},
        "spec": {"model": "tiny", "replicas": replicas},
    }


def check_dynamic(api):
    """The dynamic client: discovery, all verbs, refusals, watches."""
    dyn = dynamic.DynamicClient(api)
    instances = dyn.resources.get(api_version=API, kind="InferenceInstance")
    assert instances.namespaced and "watch" in instances.verbs
    made = instances.create(body=instance("a"), namespace="default")
    assert made.spec.replicas == 1 and made.metadata.uid
    try:
        instances.create(body=instance("a"), namespace="default")
        raise AssertionError("it was made twice")
    except ConflictError:
        pass
    try:
        instances.create(body=instance("b", "many"), namespace="default")
        raise AssertionError("it is no number")
    except UnprocessibleEntityError as error:
        assert "spec.replicas" in error.summary()

    merge = "application/merge-patch+json"
    patched = instances.patch(
        name="a", namespace="default", body={"spec": {"replicas": 2}}, content_type=merge
    )
    assert patched.spec.replicas == 2 and patched.metadata.generation == 2
    instances.status.patch(
        name="a", namespace="default", body={"status": {"phase": "Ready"}}, content_type=merge
    )
    applied = dyn.server_side_apply(
        instances, body=instance("a", 3), namespace="default", field_manager="py", force_conflicts=True
    )
    assert applied.spec.replicas == 3 and applied.status.phase == "Ready"
    stale = made.to_dict()
    try:
        instances.replace(body=stale, namespace="default")
        raise AssertionError("it is an old version")
    except ConflictError:
        pass

    listed = instances.get(namespace="default", label_selector="none=x")
    assert listed.items == []
    since = instances.get(namespace="default").metadata.resourceVersion
    seen = []

    def follow():
        for event in instances.watch(namespace="default", resource_version=since, timeout=30):
            seen.append((event["type"], event["object"].metadata.name))
            if event["type"] == "DELETED":
                return

    follower = threading.Thread(target=follow)
    follower.start()
    instances.create(body=instance("w"), namespace="default")
    instances.delete(name="w", namespace="default")
    follower.join(30)
    assert not follower.is_alive() and seen == [("ADDED", "w"), ("DELETED", "w")], seen
    instances.delete(name="a", namespace="default")
    try:
        instances.get(name="a", namespace="default")
        raise AssertionError("it is gone")
    except NotFoundError:
        pass


def check_core(api):
    """Typed calls of the core group."""
    core = client.CoreV1Api(api)
    core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name="py")))
    secret = client.V1Secret(metadata=client.V1ObjectMeta(name="key"), string_data={"a": "b"})
    core.create_namespaced_secret("py", secret)
    read = core.read_namespaced_secret("key", "py")
    assert base64.b64decode(read.data["a"]) == b"b"
    core.patch_namespaced_secret("key", "py", {"stringData": {"c": "d"}})
    assert set(core.read_namespaced_secret("key", "py").data) == {"a", "c"}
    for number in range(5):
        about = client.V1ObjectReference(kind="Shard", name=f"s{number}", namespace="py")
        core.create_namespaced_event(
            "py",
            client.CoreV1Event(
                metadata=client.V1ObjectMeta(generate_name="e-"),
                involved_object=about,
                reason="Told",
                # Without one the client can't read the event in its own group.
                event_time=datetime.datetime.now(datetime.timezone.utc),
                action="Tell",
                reporting_component="example.com/teller",
                reporting_instance="one",
                message="m",
                type="Normal",
            ),
        )
    page = core.list_namespaced_event("py", limit=2)
    rest = core.list_namespaced_event("py", limit=9, _continue=page.metadata._continue)
    assert (len(page.items), len(rest.items)) == (2, 3)
    one = core.list_event_for_all_namespaces(field_selector="involvedObject.name=s3")
    assert [event.involved_object.name for event in one.items] == ["s3"]
    own = client.EventsV1Api(api).list_namespaced_event("py")
    assert {event.regarding.kind for event in own.items} == {"Shard"}
    names = []
    for event in watch.Watch().stream(core.list_namespace, timeout_seconds=5):
        names.append(event["object"].metadata.name)
        if len(names) == 2:
            break
    assert sorted(names) == ["default", "py"]
    core.delete_namespace("py")


def check_leases(api):
    """Typed leases: one holder at a time."""
    leases = client.CoordinationV1Api(api)
    body = client.V1Lease(
        metadata=client.V1ObjectMeta(name="l"),
        spec=client.V1LeaseSpec(holder_identity="a", lease_duration_seconds=15),
    )
    held = leases.create_namespaced_lease("default", body)
    taken = leases.read_namespaced_lease("l", "default")
    taken.spec.holder_identity = "b"
    leases.replace_namespaced_lease("l", "default", taken)
    held.spec.holder_identity = "a"
    try:
        leases.replace_namespaced_lease("l", "default", held)
        raise AssertionError("two hold it")
    except TypedError as error:
        assert error.status == 409


def check_custom_objects(api):
    """The other way to objects of definitions: by their paths."""
    objects = client.CustomObjectsApi(api)
    place = {"group": GROUP, "version": VERSION, "namespace": "default", "plural": "inferenceinstances"}
    objects.create_namespaced_custom_object(body=instance("c"), **place)
    scaled = objects.patch_namespaced_custom_object_scale(name="c", body={"spec": {"replicas": 4}}, **place)
    assert scaled["spec"]["replicas"] == 4
    seen = [
        event["type"]
        for event in watch.Watch().stream(
            objects.list_namespaced_custom_object, timeout_seconds=2, **place
        )
    ]
    assert seen == ["ADDED"], seen
    objects.delete_namespaced_custom_object(name="c", **place)
    try:
        objects.get_namespaced_custom_object(name="c", **place)
        raise AssertionError("it is gone")
    except ApiException as error:
        assert error.status == 404


def main():
    configuration = client.Configuration(host=sys.argv[1])
    api = client.ApiClient(configuration)
    assert client.VersionApi(api).get_code().major == "1"
    groups = client.ApisApi(api).get_api_versions().groups
    assert GROUP in {group.name for group in groups}
    crds = client.ApiextensionsV1Api(api).list_custom_resource_definition()
    assert f"shards.{GROUP}" in {crd.metadata.name for crd in crds.items}
    check_dynamic(api)
    check_core(api)
    check_leases(api)
    check_custom_objects(api)


main()
