//! Rotary positions as checkpoints configure them: base and scaling. Owns the formulas of the frequencies; never
//! rotates.

use std::f32::consts::PI;

use mlx_rs::Array;

use super::fields::{Fields, bad};
use crate::config::ConfigError;
use crate::nn::{Frequencies, Rope};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scaling {
    None,
    Linear {
        factor: f32,
    },
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: f32,
    },
    /// "YaRN: Efficient Context Window Extension of Large Language Models", arXiv 2309.00071.
    Yarn {
        factor: f32,
        original_context: f32,
        beta_fast: f32,
        beta_slow: f32,
        mscale: f32,
        mscale_all_dim: f32,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct RopeArgs {
    pub(super) theta: f32,
    pub(super) scaling: Scaling,
}

impl RopeArgs {
    /// From `rope_theta` and `rope_scaling`, or `rope_parameters`, where newer files put both.
    pub(super) fn parse(config: Fields<'_>, default_theta: f32) -> Result<Self, ConfigError> {
        let parameters = config.object("rope_parameters")?;
        let theta = match parameters {
            Some(parameters) => parameters.number_if("rope_theta")?,
            None => None,
        };
        let theta = theta.or(config.number_if("rope_theta")?).unwrap_or(default_theta);
        let scaling = match config.object("rope_scaling")?.or(parameters) {
            Some(scaling) => Scaling::parse(scaling)?,
            None => Scaling::None,
        };
        Ok(Self { theta, scaling })
    }

    pub(super) fn build(&self, dims: i32, traditional: bool) -> Rope {
        let scale = match self.scaling {
            Scaling::Linear { factor } => 1.0 / factor,
            Scaling::None | Scaling::Llama3 { .. } | Scaling::Yarn { .. } => 1.0,
        };
        let frequencies = match self.scaling {
            Scaling::Llama3 { .. } | Scaling::Yarn { .. } => {
                let periods = self.scaling.periods(self.theta, dims);
                Frequencies::Periods(Array::from_slice(&periods, &[dims / 2]))
            }
            Scaling::None | Scaling::Linear { .. } => Frequencies::Base(self.theta),
        };
        let magnitude = match self.scaling {
            Scaling::Yarn { factor, mscale, mscale_all_dim, .. } => {
                yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
            }
            Scaling::None | Scaling::Linear { .. } | Scaling::Llama3 { .. } => 1.0,
        };
        Rope { dims, traditional, scale, magnitude, frequencies }
    }
}

/// How much sharper attention must be for a context `factor` times as long.
pub(super) fn yarn_magnitude(factor: f32, mscale: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl Scaling {
    fn parse(fields: Fields<'_>) -> Result<Self, ConfigError> {
        let kind = fields.text("type")?.or(fields.text("rope_type")?);
        match kind.unwrap_or("default") {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear { factor: fields.number("factor")? }),
            "llama3" => Ok(Self::Llama3 {
                factor: fields.number("factor")?,
                low_freq_factor: fields.number_or("low_freq_factor", 1.0)?,
                high_freq_factor: fields.number_or("high_freq_factor", 4.0)?,
                original_context: fields.number_or("original_max_position_embeddings", 8192.0)?,
            }),
            "yarn" | "deepseek_yarn" => Ok(Self::Yarn {
                factor: fields.number("factor")?,
                original_context: fields.number_or("original_max_position_embeddings", 4096.0)?,
                beta_fast: fields.number_or("beta_fast", 32.0)?,
                beta_slow: fields.number_or("beta_slow", 1.0)?,
                mscale: fields.number_or("mscale", 1.0)?,
                // 0 is a value that files have.
                mscale_all_dim: match fields.0.get("mscale_all_dim") {
                    Some(value) => value.as_f64().unwrap_or(0.0) as f32,
                    None => 0.0,
                },
            }),
            other => Err(bad("rope_scaling", format!("type '{other}' is not supported"))),
        }
    }

    /// Inverse frequencies of all rotated pairs.
    fn periods(&self, theta: f32, dims: i32) -> Vec<f32> {
        let plain: Vec<f32> =
            (0..dims / 2).map(|i| theta.powf((2 * i) as f32 / dims as f32)).collect();
        match *self {
            Self::None | Self::Linear { .. } => plain,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                // Llama 3.1 slows the long waves by `factor`, leaves the short ones and blends between the limits.
                let scaled = plain.into_iter().map(|period| {
                    let wave_length = 2.0 * PI * period;
                    if wave_length > original_context / low_freq_factor {
                        period * factor
                    } else if wave_length > original_context / high_freq_factor {
                        let smooth = (original_context / wave_length - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        period / ((1.0 - smooth) / factor + smooth)
                    } else {
                        period
                    }
                });
                scaled.collect()
            }
            Self::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
                // The pair whose wave turns so many times over the original context.
                let pair = |turns: f32| {
                    dims as f32 * (original_context / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
                };
                let low = pair(beta_fast).floor().max(0.0);
                let high = pair(beta_slow).ceil().min((dims - 1) as f32);
                let span = if high > low { high - low } else { 0.001 };
                let blended = plain.into_iter().enumerate().map(|(i, period)| {
                    let slowed = ((i as f32 - low) / span).clamp(0.0, 1.0);
                    // Frequencies, not periods, are blended.
                    1.0 / (slowed / (factor * period) + (1.0 - slowed) / period)
                });
                blended.collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(config: &Value) -> Result<RopeArgs, ConfigError> {
        RopeArgs::parse(Fields(config), 10_000.0)
    }

    #[test]
    fn llama3_scaling_leaves_short_waves_and_slows_long_ones() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let args = parse(&json!({"rope_theta": 500000.0, "rope_scaling": scaling})).unwrap();
        let plain = Scaling::None.periods(args.theta, 128);
        let scaled = args.scaling.periods(args.theta, 128);
        assert_eq!(plain[..28], scaled[..28]);
        assert!((scaled[63] / plain[63] - 8.0).abs() < 1e-4);
        let ratios: Vec<f32> = scaled.iter().zip(&plain).map(|(s, p)| s / p).collect();
        assert!(ratios.windows(2).all(|r| r[0] <= r[1] + 1e-4), "{ratios:?}");
    }

    #[test]
    fn yarn_scaling_leaves_short_waves_and_slows_long_ones() {
        let scaling = json!({"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 0, "original_max_position_embeddings": 4096});
        let args = parse(&json!({"rope_theta": 10000, "rope_scaling": scaling})).unwrap();
        let plain = Scaling::None.periods(args.theta, 64);
        let scaled = args.scaling.periods(args.theta, 64);
        let ratios: Vec<f32> = scaled.iter().zip(&plain).map(|(s, p)| s / p).collect();
        // By the paper's formula: pairs 10 and 23 are the limits.
        assert!(ratios[..=10].iter().all(|r| (r - 1.0).abs() < 1e-5), "{ratios:?}");
        assert!(ratios[11] > 1.001 && ratios[22] < 39.0, "{ratios:?}");
        assert!(ratios[23..].iter().all(|r| (r - 40.0).abs() < 1e-3), "{ratios:?}");
        let rope = args.build(64, true);
        assert!((rope.magnitude - (0.1 * 40_f32.ln() + 1.0)).abs() < 1e-6);
    }

    #[test]
    fn newer_files_have_all_in_one_place() {
        let old =
            parse(&json!({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2}}));
        let new = parse(&json!({"rope_parameters":
            {"rope_theta": 5.0, "rope_type": "linear", "factor": 2}}));
        assert_eq!(old.unwrap(), new.unwrap());
        assert_eq!(
            parse(&json!({})).unwrap(),
            RopeArgs { theta: 10_000.0, scaling: Scaling::None }
        );
        for (scaling, field) in
            [(json!({"type": "longrope"}), "rope_scaling"), (json!({"type": "yarn"}), "factor")]
        {
            let error = parse(&json!({"rope_scaling": scaling})).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
