//! The OpenAI protocol without IO: requests read, answers written.

pub(crate) mod chat;
pub(crate) mod fields;
pub(crate) mod messages;
pub(crate) mod request;
pub(crate) mod stream;
pub(crate) mod tools;
