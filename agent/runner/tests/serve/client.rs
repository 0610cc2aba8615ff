//! A gateway's side of the runner's HTTP interface.

use std::{collections::VecDeque, net::SocketAddr};

use exo_crds::generate::{FinishReason, GenerateEvent, PATH};
use exo_trust::TlsPaths;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::process::LIMIT;

pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
}

/// An answer as it comes.
pub(crate) struct Stream {
    response: reqwest::Response,
    rest: Vec<u8>,
    events: VecDeque<GenerateEvent>,
}

/// An answer that is complete.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Whole {
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: String,
    pub(crate) reason: FinishReason,
}

/// A greedy request for a text.
pub(crate) fn request(prompt: &str, max_tokens: u32) -> Value {
    json!({"id": "r", "prompt": {"text": prompt}, "max_tokens": max_tokens,
           "sampling": {"temperature": 0.0}})
}

impl Client {
    pub(crate) fn new(tls: &TlsPaths, address: SocketAddr) -> Self {
        Self { http: exo_trust::reqwest_client(tls).unwrap(), base: format!("https://{address}") }
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let response = self.http.get(self.base.clone() + path).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    pub(crate) async fn post(&self, body: &Value) -> reqwest::Response {
        let response = self.http.post(self.base.clone() + PATH).json(body).send();
        timeout(LIMIT, response).await.expect("an answer in time").unwrap()
    }

    pub(crate) async fn stream(&self, body: &Value) -> Stream {
        let response = self.post(body).await;
        assert_eq!(response.status().as_u16(), 200);
        assert_eq!(response.headers()["content-type"], "application/x-ndjson");
        Stream { response, rest: Vec::new(), events: VecDeque::new() }
    }

    /// Sends a request and waits for all of the answer.
    pub(crate) async fn whole(&self, body: &Value) -> Whole {
        self.stream(body).await.whole().await
    }

    /// The status and the error of a request that is refused.
    pub(crate) async fn refusal(&self, body: &Value) -> (u16, GenerateEvent) {
        let response = self.post(body).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// The value of a metric without labels.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics").await;
        let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("{name} in\n{text}"))[name.len() + 1..].parse().unwrap()
    }
}

impl Stream {
    pub(crate) async fn next(&mut self) -> Option<GenerateEvent> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let chunk = timeout(LIMIT, self.response.chunk()).await.expect("events in time");
            // A broken connection ends the stream, too.
            let chunk = chunk.ok()??;
            self.rest.extend(&chunk);
            while let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                self.events.push_back(serde_json::from_slice(&line).unwrap());
            }
        }
    }

    pub(crate) async fn whole(mut self) -> Whole {
        let first = self.next().await.unwrap();
        assert!(matches!(first, GenerateEvent::Start { .. }), "{first:?}");
        let (mut tokens, mut all) = (Vec::new(), String::new());
        while let Some(event) = self.next().await {
            match event {
                GenerateEvent::Token { id, text, .. } => {
                    tokens.push(id);
                    all += &text;
                }
                GenerateEvent::End { finish_reason, text, .. } => {
                    assert_eq!(self.next().await, None);
                    return Whole { tokens, text: all + &text, reason: finish_reason };
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("the stream broke off after {tokens:?}");
    }
}
