//! The frame that all architectures share: embedding, layers of attention and feed-forward with a norm before each,
//! final norm and output projection.

use std::collections::BTreeSet;

use mlx_rs::error::Exception;
use mlx_rs::transforms::eval;
use mlx_rs::{Array, Dtype};

use super::attention::{Attention, AttentionArgs};
use super::common::Common;
use super::deepseek_v3;
use super::mlp::FeedForward;
use super::single::{NoKernels, Parts, StepPath, Steps};
use super::{Args, LayerModules, Part, layer_path};
use crate::batch::{LayerCache, Pass, Place, Segments};
use crate::loader::{Home, Kind, Module, Split, Weights};
use crate::mlx::{Traced, add, rms_norm};
use crate::nn::{Embedding, Linear, last};
use crate::tensor::Team;

/// Positions on which a step is tried, and those before them.
const TRIED: i32 = 2;
const TRIED_BEHIND: i32 = 5;
/// How far it may be off: as part of the largest number, a few times what rounding to 16 bit does, and as part of what
/// the layer changes.
const TRIED_ROUNDING: f32 = 0.02;
const TRIED_OFF_MAX: f32 = 0.05;

const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];

/// Every module of the whole model. `has` says whether the checkpoint has a tensor.
pub(super) fn modules(args: &Args, has: &dyn Fn(&str) -> bool) -> Vec<Module> {
    let Common { width, vocab_size, tied, .. } = args.common;
    let mut list = Vec::new();
    let mut add = |path: &str, kind, home| {
        list.push(Module::new(path.to_owned(), kind, home, Split::Whole));
    };
    let home = if tied { Home::Ends } else { Home::First };
    add("model.embed_tokens", Kind::Embedding { rows: vocab_size, width }, home);
    add("model.norm", Kind::Norm { width }, Home::Last);
    if !tied {
        let kind = Kind::Linear { input: width, output: vocab_size, bias: false };
        add("lm_head", kind, Home::Last);
    }
    for (layer, feed_forward) in args.feed_forward.iter().enumerate() {
        let mut out = LayerModules { layer, has, list: &mut list };
        for name in NORMS {
            out.add(name, Kind::Norm { width }, Split::Whole);
        }
        match &args.attention {
            SelfAttentionArgs::Grouped(attention) => attention.modules(width, &mut out),
            SelfAttentionArgs::Latent(attention) => attention.modules(width, &mut out),
        }
        feed_forward.modules(width, &mut out);
    }
    list
}

pub(super) enum SelfAttentionArgs {
    Grouped(AttentionArgs),
    Latent(deepseek_v3::AttentionArgs),
}

enum SelfAttention {
    Grouped(Attention),
    Latent(deepseek_v3::Attention),
}

struct Block {
    self_attn: SelfAttention,
    feed_forward: FeedForward,
    input_layernorm: Array,
    post_attention_layernorm: Array,
    eps: f32,
    team: Team,
    /// For one position of a single sequence, where that has kernels of its own.
    step: Option<Traced>,
}

impl Block {
    fn build(
        args: &Args,
        layer: usize,
        weights: &mut Weights,
        team: &Team,
    ) -> Result<Self, Exception> {
        let (path, common) = (layer_path(layer), &args.common);
        let [input_layernorm, post_attention_layernorm] =
            NORMS.map(|name| weights.norm(&format!("{path}.{name}")));
        let self_attn = match &args.attention {
            SelfAttentionArgs::Grouped(attention) => {
                SelfAttention::Grouped(Attention::build(attention, common, &path, weights, team))
            }
            SelfAttentionArgs::Latent(attention) => SelfAttention::Latent(
                deepseek_v3::Attention::build(attention, common, &path, weights, team)?,
            ),
        };
        let feed_forward = args.feed_forward[layer].build(&path, weights)?;
        let (eps, team) = (common.eps, team.clone());
        Ok(Self {
            self_attn,
            feed_forward,
            input_layernorm,
            post_attention_layernorm,
            eps,
            team,
            step: None,
        })
    }

    /// What does one position of a single sequence in few kernels.
    fn make_step(&self, steps: &Steps) -> Result<Traced, NoKernels> {
        if !self.team.is_alone() {
            return Err(NoKernels::NotFor("a team of ranks"));
        }
        let SelfAttention::Grouped(attention) = &self.self_attn else {
            return Err(NoKernels::NotFor("latent attention"));
        };
        let (gate_up_proj, down_proj) =
            self.feed_forward.dense().ok_or(NoKernels::NotFor("experts"))?;
        steps.layer(Parts {
            input_norm: &self.input_layernorm,
            attention: attention.single().map_err(NoKernels::NotFor)?,
            post_norm: &self.post_attention_layernorm,
            gate_up_proj,
            down_proj,
            eps: self.eps,
        })
    }

    /// Checks that `step` gives what the layer's operations do, but for rounding: on some positions behind others, so
    /// that rotation and caches count.
    fn try_step(&self, step: &Traced) -> Result<(), NoKernels> {
        let width = self.input_layernorm.dim(0);
        let hidden = |first: i32, positions: i32| {
            let count = positions * width;
            let values: Vec<f32> = (0..count).map(|i| ((first + i) as f32 * 0.7).sin()).collect();
            Array::from_slice(&values, &[1, positions, width])
                .as_dtype(self.input_layernorm.dtype())
        };
        let row = BTreeSet::from([0]);
        let mut caches = [Segments::default(), Segments::default()];
        for segments in &mut caches {
            segments.open(0, 1);
            let x = hidden(0, TRIED_BEHIND)?;
            self.forward(&x, TRIED_BEHIND, &mut segments.pass(&row, TRIED_BEHIND)?.layer(0))?
                .eval()?;
        }
        let [by_operations, by_step] = &mut caches;
        for number in 1..=TRIED {
            let x = hidden(1000 * number, 1)?;
            let expected = self.forward(&x, 1, &mut by_operations.pass(&row, 1)?.layer(0))?;
            let mut pass = by_step.pass(&row, 1)?;
            let mut cache = pass.layer(0);
            let Some(Place { position, keys, values }) = cache.next_place(x.dtype()) else {
                return Err(NoKernels::NotFor("norms and matrices of several types"));
            };
            let found = step.apply([&x, position, keys, values])?;
            let largest = |x: &Array| x.as_dtype(Dtype::Float32)?.abs()?.max(None);
            let off = largest(&found.subtract(&expected)?)?;
            let (size, change) = (largest(&expected)?, largest(&expected.subtract(&x)?)?);
            // Kernels that can't be compiled fail here.
            eval([&off, &size, &change])?;
            let [off, size, change] = [off, size, change].map(|x| x.item_exact::<f32>());
            // Not so where one is not a number.
            let agrees = off <= size * TRIED_ROUNDING + change * TRIED_OFF_MAX;
            if !agrees {
                return Err(NoKernels::Differ { off, size, change });
            }
        }
        Ok(())
    }

    /// `x` `[1, positions, width]` to the last `wanted` positions; the cache gets all.
    fn forward(
        &self,
        x: &Array,
        wanted: i32,
        cache: &mut LayerCache<'_>,
    ) -> Result<Array, Exception> {
        let is_single = x.dim(1) == 1 && x.dtype() == self.input_layernorm.dtype();
        if let Some(step) = self.step.as_ref().filter(|_| is_single)
            && let Some(Place { position, keys, values }) = cache.next_place(x.dtype())
        {
            return step.apply([x, position, keys, values]);
        }
        let normed = rms_norm(x, Some(&self.input_layernorm), self.eps)?;
        let attended = match &self.self_attn {
            SelfAttention::Grouped(attention) => attention.forward(&normed, wanted, cache)?,
            SelfAttention::Latent(attention) => attention.forward(&normed, wanted, cache)?,
        };
        let x = add(&last(x, wanted)?, &attended)?;
        let normed = rms_norm(&x, Some(&self.post_attention_layernorm), self.eps)?;
        add(&x, &self.feed_forward.forward(&normed, &self.team)?)
    }
}

/// The steps of all layers that can have one if the first one's does here what it should: kernels are compiled on the
/// machine, and for GPUs that nobody has tried.
fn steps_of(layers: &[Block], eps: f32) -> Result<Vec<Option<Traced>>, NoKernels> {
    let steps = Steps::new(eps)?;
    if let Some(first) = layers.first() {
        first.try_step(&first.make_step(&steps)?)?;
    }
    let step = |layer: &Block| match layer.make_step(&steps) {
        Ok(step) => Ok(Some(step)),
        Err(NoKernels::NotFor(_)) => Ok(None),
        Err(reason) => Err(reason),
    };
    layers.iter().map(step).collect()
}

fn give_steps(layers: &mut [Block], eps: f32) -> StepPath {
    match steps_of(layers, eps) {
        Ok(steps) => {
            layers.iter_mut().zip(steps).for_each(|(layer, step)| layer.step = step);
            StepPath::Kernels { layers: layers.iter().filter(|l| l.step.is_some()).count() }
        }
        Err(reason) => StepPath::Operations(reason),
    }
}

enum Head {
    Own(Linear),
    /// The embedding serves as output projection.
    Tied,
}

/// One rank's part of a model. Arrays are `[1, positions, features]`.
pub(crate) struct Model {
    embed_tokens: Option<Embedding>,
    layers: Vec<Block>,
    /// Norm and output projection; last rank only.
    head: Option<(Array, Head)>,
    eps: f32,
    step_path: StepPath,
}

impl Model {
    pub(super) fn build(
        args: &Args,
        part: &Part,
        team: &Team,
        mut weights: Weights,
    ) -> Result<Self, Exception> {
        let common = &args.common;
        let embeds = part.owns(if common.tied { Home::Ends } else { Home::First });
        let embed_tokens = embeds.then(|| weights.embedding("model.embed_tokens"));
        let layers: Result<Vec<Block>, Exception> =
            part.layers.clone().map(|i| Block::build(args, i, &mut weights, team)).collect();
        let mut layers = layers?;
        let step_path = give_steps(&mut layers, common.eps);
        let head = part.last.then(|| {
            let tied = common.tied;
            let head = if tied { Head::Tied } else { Head::Own(weights.linear("lm_head")) };
            (weights.norm("model.norm"), head)
        });
        weights.finish();
        Ok(Self { embed_tokens, layers, head, eps: common.eps, step_path })
    }

    pub(crate) fn step_path(&self) -> &StepPath {
        &self.step_path
    }

    /// Token ids `[1, positions]` to hidden states. First rank only.
    pub(crate) fn embed(&self, tokens: &Array) -> Result<Array, Exception> {
        self.embed_tokens.as_ref().expect("called on the first rank").forward(tokens)
    }

    /// Hidden states through this rank's layers; the result is that of the last `wanted` positions. Where `pass` feeds
    /// several sequences, each has one of the positions and all are wanted.
    pub(crate) fn forward(
        &self,
        mut x: Array,
        wanted: i32,
        pass: &mut Pass<'_>,
    ) -> Result<Array, Exception> {
        assert_eq!(self.layers.len(), pass.layers(), "one cache per layer");
        let count = self.layers.len();
        for (i, layer) in self.layers.iter().enumerate() {
            // Later layers attend to every position; behind the last one only those that are wanted matter.
            let wanted = if i + 1 == count { wanted } else { x.dim(1) };
            x = layer.forward(&x, wanted, &mut pass.layer(i))?;
        }
        Ok(x)
    }

    /// The first of this rank's layers behind which hidden states of `tokens` `[1, positions]`, which `pass` feeds, are
    /// not finite. First rank only.
    pub(crate) fn first_not_finite(
        &self,
        tokens: &Array,
        pass: &mut Pass<'_>,
    ) -> Result<Option<usize>, Exception> {
        let mut x = self.embed(tokens)?;
        let zero = Array::from_f32(0.0);
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, x.dim(1), &mut pass.layer(i))?;
            // NaN and infinity are the numbers that less themselves are not zero.
            let finite = x.subtract(&x)?.eq(&zero)?.all(None)?;
            finite.eval()?;
            if !finite.item_exact::<bool>() {
                return Ok(Some(i));
            }
        }
        Ok(None)
    }

    /// Hidden states to logits. Last rank only.
    pub(crate) fn head(&self, x: &Array) -> Result<Array, Exception> {
        let (norm, head) = self.head.as_ref().expect("called on the last rank");
        let x = rms_norm(x, Some(norm), self.eps)?;
        match (head, &self.embed_tokens) {
            (Head::Own(linear), _) => linear.forward(&x),
            (Head::Tied, Some(embedding)) => embedding.as_linear(&x),
            (Head::Tied, None) => unreachable!("a tied embedding is at both ends"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::Config;
    use crate::loader::{self, Checkpoint, Selection};
    use crate::mlx::{Shapes, matmul};

    const WIDTH: i32 = 32;

    /// Layers that change nothing: all of their matrices are zero.
    fn model(model_type: &str) -> Model {
        crate::mlx::init();
        let raw = json!({"hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 48,
            "num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 8});
        let (model_type, eos_token_ids) = (model_type.to_owned(), Vec::new());
        let config = Config { model_type, eos_token_ids, quantization: None, raw };
        let args = Args::parse(&config).unwrap();
        let modules = args.modules(&|_| false);
        let dir = tempfile::tempdir().unwrap();
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for module in &modules {
            let shape = match module.kind {
                Kind::Linear { input, output, .. } => vec![output, input],
                Kind::Embedding { rows, width } => vec![rows, width],
                Kind::Norm { width } => vec![width],
                Kind::Vector { .. } | Kind::Stack { .. } => panic!("{module:?}"),
            };
            let start = end;
            end += shape.iter().product::<i32>() * 4;
            let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
            header.insert(format!("{}.weight", module.path), entry);
        }
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.resize(file.len() + end as usize, 0);
        std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
        let part = Part { layers: 0..2, first: true, last: true };
        let team = Team::default();
        let selection = Selection {
            modules: &modules,
            quantization: None,
            ignored: &|_| false,
            owns: &|home| part.owns(home),
            share: team.share(),
        };
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let weights = loader::load(&checkpoint, &selection, &mut |_| {}).unwrap();
        args.build(&part, &team, weights).unwrap()
    }

    /// A step that multiplies hidden states.
    fn times(factor: f32) -> Traced {
        let at = |i: i32| if i % (WIDTH + 1) == 0 { factor } else { 0.0 };
        let values: Vec<f32> = (0..WIDTH * WIDTH).map(at).collect();
        let matrix = Array::from_slice(&values, &[WIDTH, WIDTH]);
        Traced::new(Shapes::Same, move |inputs| matmul(&inputs[0], &matrix)).unwrap()
    }

    #[test]
    fn kernels_that_differ_or_fail_are_a_fallback_with_its_reason() {
        let layer = &model("llama").layers[0];
        assert_eq!(layer.try_step(&times(1.0)), Ok(()));
        assert_eq!(layer.try_step(&times(1.01)), Ok(()));
        let failed = Traced::new(Shapes::Same, |_| Err(Exception::custom("no compiler"))).unwrap();
        for (step, text) in [
            (times(1.5), "off by 4.9"),
            (times(f32::NAN), "off by NaN"),
            (failed, "they fail on this machine: no compiler"),
        ] {
            let reason = layer.try_step(&step).unwrap_err();
            assert!(reason.to_string().contains(text), "{reason}");
            let path = StepPath::Operations(reason);
            assert!(path.fallback().is_some(), "{path}");
            assert!(path.to_string().starts_with("no kernels of our own: "), "{path}");
        }
    }

    #[test]
    fn what_kernels_are_not_for_is_no_fallback() {
        for path in [
            StepPath::Kernels { layers: 3 },
            StepPath::Operations(NoKernels::NoGpu),
            StepPath::Operations(NoKernels::NotFor("experts")),
        ] {
            assert_eq!(path.fallback(), None, "{path}");
        }
        let path = |model_type| model(model_type).step_path().clone();
        match crate::mlx::kernels::can_run() {
            true => assert_eq!(path("llama"), StepPath::Kernels { layers: 2 }),
            false => assert_eq!(path("llama"), StepPath::Operations(NoKernels::NoGpu)),
        }
    }
}
