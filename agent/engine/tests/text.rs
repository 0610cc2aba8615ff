//! The text side on the built-in model, against what transformers made of the same conversations.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use exo_engine::text::{ChatInput, ChatTemplate, Detokenizer, Tokenizer};
use serde_json::Value;

fn list(question: &Value, field: &str) -> Vec<Value> {
    question.get(field).and_then(Value::as_array).cloned().unwrap_or_default()
}

#[test]
fn questions_and_answers_have_the_tokens_that_transformers_gives_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let questions = std::fs::read(root.join("tests/tiny-model/questions.json")).unwrap();
    let questions: Vec<Value> = serde_json::from_slice(&questions).unwrap();
    assert!(questions.len() >= 100);
    let model = root.join("manifests/models/tiny");
    let tokenizer = Tokenizer::load(&model).unwrap();
    let template = ChatTemplate::load(&model).unwrap();
    for question in &questions {
        let id = &question["id"];
        let (messages, tools) = (list(question, "messages"), list(question, "tools"));
        let input =
            ChatInput { messages: &messages, tools: &tools, add_generation_prompt: true, now: 0 };
        let prompt = tokenizer.encode(&template.render(&input).unwrap()).unwrap();
        assert_eq!(prompt.len() as u64, question["prompt_tokens"].as_u64().unwrap(), "{id}");

        let answer = question["answer"].as_str().unwrap();
        let tokens: Vec<u32> = serde_json::from_value(question["answer_tokens"].clone()).unwrap();
        assert_eq!(tokenizer.encode(answer).unwrap(), tokens, "{id}");
        let mut detokenizer = Detokenizer::new();
        let mut text = String::new();
        for token in tokens {
            text += &detokenizer.push(&tokenizer, token).unwrap();
        }
        assert_eq!(text + &detokenizer.finish(&tokenizer).unwrap(), answer, "{id}");
    }
}
