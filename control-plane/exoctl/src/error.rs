//! Errors in the words that a person reads: one clear sentence each.

use std::{fmt, io};

use kube::core::Status;

/// Several independent failures of one command.
#[derive(Debug)]
pub(crate) struct Failures(Vec<anyhow::Error>);

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failures", self.0.len())
    }
}

impl std::error::Error for Failures {}

/// `exoctl diff` found a difference: no failure, but the exit status tells scripts.
#[derive(Debug, thiserror::Error)]
#[error("there are differences")]
pub(crate) struct Differs;

/// A failure, and what else the user may try.
#[derive(Debug)]
pub(crate) struct Hinted {
    pub(crate) error: anyhow::Error,
    pub(crate) hint: String,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl std::error::Error for Hinted {}

/// Collects failures of a command that goes on with the rest.
#[derive(Debug, Default)]
pub(crate) struct Collector(Vec<anyhow::Error>);

impl Collector {
    /// Keeps an error. One about a closed pipe ends everything at once; so does a server that can't
    /// find out: it would say the same of all the rest, each time after a while.
    pub(crate) fn note<T>(&mut self, result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if is_broken_pipe(&error) => Err(error),
            Err(error) if is_unavailable(&error) => {
                self.0.push(error);
                Err(Failures(std::mem::take(&mut self.0)).into())
            }
            Err(error) => {
                self.0.push(error);
                Ok(None)
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn finish(self) -> anyhow::Result<()> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err(Failures(self.0).into()),
        }
    }
}

/// What to print: a line for every failure, then what may be tried.
pub(crate) fn lines(error: &anyhow::Error) -> Vec<String> {
    if let Some(Hinted { error, hint }) = error.downcast_ref::<Hinted>() {
        return lines(error).into_iter().chain([hint.clone()]).collect();
    }
    match error.downcast_ref::<Failures>() {
        Some(failures) => failures.0.iter().flat_map(lines).collect(),
        None => vec![format!("error: {error:#}")],
    }
}

pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// The API server's refusal.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) Box<Status>);

impl Refused {
    pub(crate) fn is_not_found(&self) -> bool {
        self.0.code == 404
    }

    pub(crate) fn is_conflict(&self) -> bool {
        self.0.code == 409 && self.0.reason != "AlreadyExists"
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = &self.0;
        let message = match status.message.trim() {
            "" if status.reason.is_empty() => format!("the server answered {}", status.code),
            "" => status.reason.clone(),
            message => message.to_owned(),
        };
        f.write_str(&message)?;
        // Most servers put the fields into the message; those that don't, list them.
        let causes = status.details.iter().flat_map(|details| &details.causes);
        for cause in causes.filter(|cause| !cause.field.is_empty()) {
            if !message.contains(&cause.field) {
                write!(f, "; {}: {}", cause.field, cause.message)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}

/// The refusal in an error's chain, if that is what it is.
pub(crate) fn refused(error: &anyhow::Error) -> Option<&Refused> {
    error.downcast_ref::<Refused>()
}

/// Whether the server says that something isn't there.
pub(crate) fn is_not_found(error: &anyhow::Error) -> bool {
    refused(error).is_some_and(Refused::is_not_found)
}

/// Whether a server says that it can't find out now.
pub(crate) fn is_unavailable(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<Failures>() {
        Some(failures) => failures.0.iter().any(is_unavailable),
        None => refused(error).is_some_and(|refused| refused.0.code == 503),
    }
}

/// What rustls says where the two sides have certificates of different clusters.
const FOREIGN: [&str; 4] =
    ["invalid peer certificate", "UnknownCA", "DecryptError", "CertificateUnknown"];

/// Turns a client error into one sentence. `server` says who was asked, `kubeconfig` who said so.
pub(crate) fn explain(error: kube::Error, server: &str, kubeconfig: &str) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => Refused(status).into(),
        kube::Error::SerdeError(error) => {
            anyhow::anyhow!("{server} sent something that is not the Kubernetes API: {error}")
        }
        error => {
            let mut cause: &dyn std::error::Error = &error;
            while let Some(source) = cause.source() {
                cause = source;
            }
            let cause = cause.to_string();
            match FOREIGN.iter().any(|words| cause.contains(words)) {
                true => anyhow::anyhow!(
                    "the API server at {server} and {kubeconfig} don't belong together ({cause}): is \
                     that file of an earlier or another cluster? --kubeconfig FILE or KUBECONFIG \
                     names another one"
                ),
                false => anyhow::anyhow!("can't reach the API server at {server}: {cause}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(status: serde_json::Value) -> String {
        Refused(serde_json::from_value(status).unwrap()).to_string()
    }

    #[test]
    fn a_refusal_names_each_field_once() {
        assert_eq!(
            refusal(json!({"code": 422, "message": "instance is invalid: spec.replicas: too big",
                "details": {"causes": [{"field": "spec.replicas", "message": "too big", "reason": "x"}]}})),
            "instance is invalid: spec.replicas: too big"
        );
        assert_eq!(
            refusal(json!({"code": 422, "message": "instance is invalid",
                "details": {"causes": [{"field": "spec.replicas", "message": "too big", "reason": "x"}]}})),
            "instance is invalid; spec.replicas: too big"
        );
        assert_eq!(refusal(json!({"code": 503})), "the server answered 503");
    }

    #[test]
    fn a_kubeconfig_of_another_cluster_is_named() {
        let text = |cause: &str| {
            let error = kube::Error::Service(Box::new(io::Error::other(cause.to_owned())));
            explain(error, "https://a:1", "/k").to_string()
        };
        let foreign = text("invalid peer certificate: BadSignature");
        assert!(foreign.starts_with("the API server at https://a:1 and /k don't belong together"));
        assert!(text("received fatal alert: UnknownCA").contains("/k"));
        let down = text("Connection refused (os error 111)");
        assert!(down.starts_with("can't reach the API server at https://a:1: "), "{down}");
    }

    #[test]
    fn every_failure_gets_its_line() {
        let mut collector = Collector::default();
        collector.note::<()>(Err(anyhow::anyhow!("one"))).unwrap();
        assert_eq!(collector.note(Ok(1)).unwrap(), Some(1));
        let two = anyhow::anyhow!("cause").context("two");
        collector.note::<()>(Err(two)).unwrap();
        assert_eq!(lines(&collector.finish().unwrap_err()), ["error: one", "error: two: cause"]);

        let mut collector = Collector::default();
        collector.note::<()>(Err(anyhow::anyhow!("one"))).unwrap();
        let status = json!({"code": 503, "message": "no majority"});
        let lost = Refused(serde_json::from_value(status).unwrap());
        let ended = collector.note::<()>(Err(lost.into())).unwrap_err();
        assert_eq!(lines(&ended), ["error: one", "error: no majority"]);
        assert!(is_unavailable(&ended));
        let hinted = Hinted { error: ended, hint: "try again".to_owned() }.into();
        assert_eq!(lines(&hinted), ["error: one", "error: no majority", "try again"]);

        let pipe = io::Error::from(io::ErrorKind::BrokenPipe);
        let noted = Collector::default().note::<()>(Err(pipe.into()));
        assert!(is_broken_pipe(&noted.unwrap_err()));
    }
}
