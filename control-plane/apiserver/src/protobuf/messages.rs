//! The messages that can be read: their fields with number, name in JSON, and kind.

/// What a field holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Text,
    /// Base64 in JSON.
    Bytes,
    /// A whole number that is there if it was set.
    Number,
    /// A whole number that is written even if it was not set, as 0.
    Count,
    Flag,
    /// To the second.
    Time,
    /// To the microsecond.
    MicroTime,
    /// Bytes that are JSON.
    Json,
    Of(&'static Message),
    /// A map from texts to this.
    Entries(&'static Kind),
}

pub(super) type Message = [FieldType];

#[derive(Clone, Copy, Debug)]
pub(super) struct FieldType {
    pub(super) number: u64,
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) repeated: bool,
}

const fn one(number: u64, name: &'static str, kind: Kind) -> FieldType {
    FieldType { number, name, kind, repeated: false }
}

const fn many(number: u64, name: &'static str, kind: Kind) -> FieldType {
    FieldType { number, name, kind, repeated: true }
}

/// Where almost every kind has it.
const fn spec(fields: &'static Message) -> FieldType {
    one(2, "spec", Of(fields))
}

/// To another object.
const fn reference(number: u64, name: &'static str) -> FieldType {
    one(number, name, Of(&REFERENCE))
}

use Kind::{Bytes, Count, Entries, Flag, Json, MicroTime, Number, Of, Text, Time};

/// The message of a kind, if it is one that clients send to this server.
pub(super) fn find(api_version: &str, kind: &str) -> Option<&'static Message> {
    Some(match (api_version, kind) {
        // Options of a deletion come in whatever version the object has.
        (_, "DeleteOptions") => &DELETE_OPTIONS,
        ("v1", "Namespace") => &NAMESPACE,
        ("v1", "Secret") => &SECRET,
        ("v1", "Event") => &CORE_EVENT,
        ("events.k8s.io/v1", "Event") => &EVENT,
        ("coordination.k8s.io/v1", "Lease") => &LEASE,
        ("autoscaling/v1", "Scale") => &SCALE,
        ("authorization.k8s.io/v1", "SelfSubjectAccessReview") => &ACCESS_REVIEW,
        ("authorization.k8s.io/v1", "SelfSubjectRulesReview") => &RULES_REVIEW,
        ("authentication.k8s.io/v1", "SelfSubjectReview") => &SUBJECT_REVIEW,
        _ => return None,
    })
}

/// What an object is, in its envelope.
pub(super) static TYPE_META: [FieldType; 2] = [one(1, "apiVersion", Text), one(2, "kind", Text)];

static OBJECT_META: [FieldType; 15] = [
    one(1, "name", Text),
    one(2, "generateName", Text),
    one(3, "namespace", Text),
    one(5, "uid", Text),
    one(6, "resourceVersion", Text),
    one(7, "generation", Count),
    one(8, "creationTimestamp", Time),
    one(9, "deletionTimestamp", Time),
    one(10, "deletionGracePeriodSeconds", Number),
    one(11, "labels", Entries(&Text)),
    one(12, "annotations", Entries(&Text)),
    many(
        13,
        "ownerReferences",
        Of(&[
            one(1, "kind", Text),
            one(3, "name", Text),
            one(4, "uid", Text),
            one(5, "apiVersion", Text),
            one(6, "controller", Flag),
            one(7, "blockOwnerDeletion", Flag),
        ]),
    ),
    many(14, "finalizers", Text),
    many(
        17,
        "managedFields",
        Of(&[
            one(1, "manager", Text),
            one(2, "operation", Text),
            one(3, "apiVersion", Text),
            one(4, "time", Time),
            one(6, "fieldsType", Text),
            one(7, "fieldsV1", Json),
            one(8, "subresource", Text),
        ]),
    ),
    one(4, "selfLink", Text),
];

const METADATA: FieldType = one(1, "metadata", Of(&OBJECT_META));

static DELETE_OPTIONS: [FieldType; 5] = [
    one(1, "gracePeriodSeconds", Number),
    one(2, "preconditions", Of(&[one(1, "uid", Text), one(2, "resourceVersion", Text)])),
    one(3, "orphanDependents", Flag),
    one(4, "propagationPolicy", Text),
    many(5, "dryRun", Text),
];

static NAMESPACE: [FieldType; 3] = [
    METADATA,
    spec(&[many(1, "finalizers", Text)]),
    one(3, "status", Of(&[one(1, "phase", Text)])),
];

static SECRET: [FieldType; 5] = [
    METADATA,
    one(2, "data", Entries(&Bytes)),
    one(3, "type", Text),
    one(4, "stringData", Entries(&Text)),
    one(5, "immutable", Flag),
];

static REFERENCE: [FieldType; 7] = [
    one(1, "kind", Text),
    one(2, "namespace", Text),
    one(3, "name", Text),
    one(4, "uid", Text),
    one(5, "apiVersion", Text),
    one(6, "resourceVersion", Text),
    one(7, "fieldPath", Text),
];
static SOURCE: [FieldType; 2] = [one(1, "component", Text), one(2, "host", Text)];
static SERIES: [FieldType; 2] = [one(1, "count", Count), one(2, "lastObservedTime", MicroTime)];

static CORE_EVENT: [FieldType; 15] = [
    METADATA,
    reference(2, "involvedObject"),
    one(3, "reason", Text),
    one(4, "message", Text),
    one(5, "source", Of(&SOURCE)),
    one(6, "firstTimestamp", Time),
    one(7, "lastTimestamp", Time),
    one(8, "count", Count),
    one(9, "type", Text),
    one(10, "eventTime", MicroTime),
    one(11, "series", Of(&SERIES)),
    one(12, "action", Text),
    reference(13, "related"),
    one(14, "reportingComponent", Text),
    one(15, "reportingInstance", Text),
];

static EVENT: [FieldType; 15] = [
    METADATA,
    one(2, "eventTime", MicroTime),
    one(3, "series", Of(&SERIES)),
    one(4, "reportingController", Text),
    one(5, "reportingInstance", Text),
    one(6, "action", Text),
    one(7, "reason", Text),
    reference(8, "regarding"),
    reference(9, "related"),
    one(10, "note", Text),
    one(11, "type", Text),
    one(12, "deprecatedSource", Of(&SOURCE)),
    one(13, "deprecatedFirstTimestamp", Time),
    one(14, "deprecatedLastTimestamp", Time),
    one(15, "deprecatedCount", Count),
];

static LEASE: [FieldType; 2] = [
    METADATA,
    spec(&[
        one(1, "holderIdentity", Text),
        one(2, "leaseDurationSeconds", Number),
        one(3, "acquireTime", MicroTime),
        one(4, "renewTime", MicroTime),
        one(5, "leaseTransitions", Number),
        one(6, "strategy", Text),
        one(7, "preferredHolder", Text),
    ]),
];

static SCALE: [FieldType; 2] = [METADATA, spec(&[one(1, "replicas", Number)])];

static ACCESS_REVIEW: [FieldType; 2] = [
    METADATA,
    spec(&[
        one(
            1,
            "resourceAttributes",
            Of(&[
                one(1, "namespace", Text),
                one(2, "verb", Text),
                one(3, "group", Text),
                one(4, "version", Text),
                one(5, "resource", Text),
                one(6, "subresource", Text),
                one(7, "name", Text),
            ]),
        ),
        one(2, "nonResourceAttributes", Of(&[one(1, "path", Text), one(2, "verb", Text)])),
    ]),
];

static RULES_REVIEW: [FieldType; 2] = [METADATA, spec(&[one(1, "namespace", Text)])];

static SUBJECT_REVIEW: [FieldType; 1] = [METADATA];
