//! Steps on one rank: however a sequence is fed, it draws the same tokens.

#![allow(clippy::unwrap_used)]

mod common;

use common::{LAYERS, VOCAB, config, tensors, write};
use exo_engine::{Engine, EngineError, LoadConfig, Opening, Sampling, Sharding, Step, StepOutput};
use tempfile::TempDir;

fn engine() -> (TempDir, Engine) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config(), &tensors());
    let model_dir = dir.path().to_owned();
    let config = LoadConfig {
        model_dir,
        layers: 0..LAYERS,
        sharding: Sharding::Pipeline,
        group: None,
        context_length: 400,
    };
    let engine = Engine::load(&config, &mut |_| {}).unwrap();
    (dir, engine)
}

fn sampling(logprobs: Option<u32>) -> Sampling {
    Sampling { temperature: 1.0, top_p: 0.95, seed: 5, logprobs, ..Sampling::greedy() }
}

fn prefill(engine: &mut Engine, seq: u64, tokens: &[u32], draw: u64) -> StepOutput {
    let step = Step::Prefill { seq, tokens: tokens.to_vec(), sample: true, draw };
    engine.step(&step).unwrap().unwrap()
}

fn decode(engine: &mut Engine, seq: u64, mut token: u32, draws: std::ops::Range<u64>) -> Vec<u32> {
    let mut tokens = Vec::new();
    for draw in draws {
        token = engine.step(&Step::Decode { seq, token, draw }).unwrap().unwrap().token;
        tokens.push(token);
    }
    tokens
}

#[test]
fn chunks_and_resumption_change_nothing() {
    let (_dir, mut engine) = engine();
    let prompt: Vec<u32> = (0..300).map(|i| (i * 7 % VOCAB) as u32).collect();
    engine.open(1, &sampling(None).into());
    let first = prefill(&mut engine, 1, &prompt, 0).token;
    let rest = decode(&mut engine, 1, first, 1..30);

    engine.open(2, &sampling(None).into());
    let (a, b) = prompt.split_at(123);
    let chunk = Step::Prefill { seq: 2, tokens: a.to_vec(), sample: false, draw: 0 };
    assert_eq!(engine.step(&chunk).unwrap(), None);
    assert_eq!(prefill(&mut engine, 2, b, 0).token, first);
    assert_eq!(decode(&mut engine, 2, first, 1..30), rest);

    // As after a break: prompt and all tokens so far are fed anew, the draws are counted on.
    engine.close(1);
    let mut fed = prompt.clone();
    fed.push(first);
    fed.extend(&rest[..9]);
    engine.open(3, &sampling(None).into());
    assert_eq!(prefill(&mut engine, 3, &fed, 10).token, rest[9]);
    assert_eq!(decode(&mut engine, 3, rest[9], 11..30), rest[10..]);
}

#[test]
fn sequences_do_not_touch_each_other() {
    let (_dir, mut engine) = engine();
    let mut expect = Vec::new();
    for seq in 0..3 {
        engine.open(seq, &sampling(None).into());
        let first = prefill(&mut engine, seq, &[seq as u32 + 5, 9], 0).token;
        expect.push((first, decode(&mut engine, seq, first, 1..20)));
        engine.close(seq);
    }
    let mut last = Vec::new();
    for seq in 0..3 {
        engine.open(seq, &sampling(None).into());
        last.push(prefill(&mut engine, seq, &[seq as u32 + 5, 9], 0).token);
    }
    for draw in 1..20 {
        for seq in 0..3_u64 {
            let i = seq as usize;
            last[i] = decode(&mut engine, seq, last[i], draw..draw + 1)[0];
            assert_eq!(last[i], expect[i].1[draw as usize - 1]);
        }
    }
}

#[test]
fn a_token_other_than_the_drawn_one_is_fed_as_told() {
    let (_dir, mut engine) = engine();
    // No token comes twice: what was counted of a step that is taken back would change the answer.
    let penalized = Sampling { presence_penalty: 100.0, ..sampling(None) };
    for sampling in [Sampling::greedy(), penalized] {
        engine.open(1, &sampling.clone().into());
        let first = prefill(&mut engine, 1, &[3, 4, 5], 0).token;
        // Behind it a step was begun with what it drew.
        let drawn = decode(&mut engine, 1, first, 1..2)[0];
        let other = (drawn + 1) % VOCAB as u32;
        let tokens = decode(&mut engine, 1, other, 2..40);

        engine.open(2, &Opening { prompt: Some(3), ..sampling.into() });
        let second = prefill(&mut engine, 2, &[3, 4, 5, first, other], 2).token;
        assert_eq!(tokens[0], second);
        assert_eq!(tokens[1..], decode(&mut engine, 2, second, 3..40));
    }
}

#[test]
fn log_probabilities_come_with_every_draw() {
    let (_dir, mut engine) = engine();
    engine.open(1, &sampling(Some(VOCAB as u32)).into());
    let output = prefill(&mut engine, 1, &[3, 4, 5], 0);
    let step = Step::Decode { seq: 1, token: output.token, draw: 1 };
    for output in [output, engine.step(&step).unwrap().unwrap()] {
        assert_eq!(output.top.len(), VOCAB);
        let sum: f64 = output.top.iter().map(|(_, p)| f64::from(*p).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-4, "{sum}");
        assert!(output.top.windows(2).all(|w| w[0].1 >= w[1].1));
        let own = output.top.iter().find(|(token, _)| *token == output.token).unwrap();
        assert_eq!(Some(own.1), output.logprob);
    }
}

#[test]
fn refused_steps_leave_the_sequence_as_it_was() {
    let (_dir, mut engine) = engine();
    let step =
        |tokens: &[u32]| Step::Prefill { seq: 1, tokens: tokens.to_vec(), sample: true, draw: 0 };
    assert!(matches!(engine.step(&step(&[1])), Err(EngineError::UnknownSequence(1))));
    engine.open(1, &Sampling::greedy().into());
    let expect = {
        engine.open(2, &Sampling::greedy().into());
        prefill(&mut engine, 2, &[7, 8, 9], 0).token
    };
    assert!(matches!(engine.step(&step(&[])), Err(EngineError::NoTokens)));
    let outside = VOCAB as u32;
    let refused = engine.step(&step(&[1, outside]));
    assert!(matches!(refused, Err(EngineError::Token { token, .. }) if token == outside));
    let refused = engine.step(&step(&[1; 401]));
    assert!(matches!(refused, Err(EngineError::ContextFull { wanted: 401, max_context: 400 })));
    assert_eq!(prefill(&mut engine, 1, &[7, 8, 9], 0).token, expect);

    // Nor do they touch what was begun ahead.
    let answer = decode(&mut engine, 2, expect, 1..6);
    let mut tokens = decode(&mut engine, 1, expect, 1..3);
    let refused = engine.step(&Step::Decode { seq: 1, token: outside, draw: 3 });
    assert!(matches!(refused, Err(EngineError::Token { .. })));
    assert!(matches!(engine.step(&step(&[1; 399])), Err(EngineError::ContextFull { .. })));
    tokens.extend(decode(&mut engine, 1, tokens[1], 3..6));
    assert_eq!(tokens, answer);

    // The context can be filled to its last place.
    engine.open(3, &Sampling::greedy().into());
    let token = prefill(&mut engine, 3, &[1; 398], 0).token;
    let last = decode(&mut engine, 3, token, 1..3)[1];
    let over = engine.step(&Step::Decode { seq: 3, token: last, draw: 3 });
    assert!(matches!(over, Err(EngineError::ContextFull { wanted: 401, .. })));
}

#[test]
fn memory_is_given_back_when_sequences_close() {
    let (_dir, mut engine) = engine();
    let before = engine.memory_bytes();
    for seq in 0..4 {
        engine.open(seq, &Sampling::greedy().into());
        prefill(&mut engine, seq, &[1; 200], 0);
    }
    // Keys and values of 256 positions: 2 heads of 8 floats in 3 layers.
    let one = 2 * 256 * 2 * 8 * 4 * LAYERS as u64;
    assert!(engine.memory_bytes() >= before + 4 * one);
    for seq in 0..4 {
        engine.close(seq);
    }
    assert!(engine.memory_bytes() < before + one, "{} {before}", engine.memory_bytes());
    assert!(engine.peak_memory_bytes() >= before + 4 * one);
}
