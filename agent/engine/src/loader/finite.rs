//! Which values of a file are NaN or infinite. Owns how each type marks them; reads nothing.

use mlx_rs::Dtype;

/// Bytes looked at without a branch in between, so that several values are looked at at once.
const BLOCK_BYTES: usize = 4096;

/// Where the first value of `bytes` begins, little-endian values of `dtype`, that is NaN or infinite.
pub(super) fn first_not_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> {
    // All bits of a float's exponent are set then.
    let sixteen = |mask: u16| move |value: &[u8; 2]| u16::from_le_bytes(*value) & mask == mask;
    match dtype {
        Dtype::Bfloat16 => find(bytes, sixteen(0x7f80)),
        Dtype::Float16 => find(bytes, sixteen(0x7c00)),
        Dtype::Float32 => {
            const MASK: u32 = 0x7f80_0000;
            find(bytes, |value: &[u8; 4]| u32::from_le_bytes(*value) & MASK == MASK)
        }
        // The scales of mxfp4: exponents alone, of which the largest is none (OCP Microscaling Formats 1.0, 5.4.1).
        Dtype::Uint8 => find(bytes, |value: &[u8; 1]| value[0] == u8::MAX),
        // Packed values are always finite; nothing else is read.
        _ => None,
    }
}

fn find<const N: usize>(bytes: &[u8], is_wanted: impl Fn(&[u8; N]) -> bool) -> Option<usize> {
    bytes.chunks(BLOCK_BYTES).enumerate().find_map(|(block, bytes)| {
        let (values, _) = bytes.as_chunks::<N>();
        if !values.iter().fold(false, |found, value| found | is_wanted(value)) {
            return None;
        }
        let place = values.iter().position(&is_wanted)?;
        Some(block * BLOCK_BYTES + place * N)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(dtype: Dtype, good: &[&[u8]], bad: &[&[u8]]) {
        let size = good[0].len();
        let mut bytes: Vec<u8> = good
            .iter()
            .copied()
            .cycle()
            .take(3 * BLOCK_BYTES / size + 1)
            .flatten()
            .copied()
            .collect();
        assert_eq!(first_not_finite(&bytes, dtype), None, "{dtype:?}");
        for bad in bad {
            for place in [0, 1, BLOCK_BYTES / size - 1, BLOCK_BYTES / size, bytes.len() / size - 1]
            {
                let own = place * size..(place + 1) * size;
                let before = bytes[own.clone()].to_vec();
                bytes[own.clone()].copy_from_slice(bad);
                assert_eq!(
                    first_not_finite(&bytes, dtype),
                    Some(place * size),
                    "{dtype:?} {bad:?}"
                );
                bytes[own].copy_from_slice(&before);
            }
        }
    }

    #[test]
    fn finds_the_first_value_that_is_none_of_each_type() {
        let of = |value: f32| value.to_le_bytes();
        let (largest, least) = (of(f32::MAX), of(-f32::MIN_POSITIVE));
        check(
            Dtype::Float32,
            &[&of(0.0), &largest, &least, &of(-1.5)],
            &[&of(f32::NAN), &of(f32::INFINITY), &of(f32::NEG_INFINITY)],
        );
        // 65504 and -6e-8; infinite, and a NaN with the least payload.
        check(Dtype::Float16, &[&[0xff, 0x7b], &[0x01, 0x80]], &[&[0x00, 0x7c], &[0x01, 0xfc]]);
        check(
            Dtype::Bfloat16,
            &[&[0x7f, 0x7f], &[0xff, 0x80], &[0x00, 0x7c]],
            &[&[0x80, 0x7f], &[0x81, 0xff]],
        );
        check(Dtype::Uint8, &[&[0], &[254]], &[&[255]]);
        assert_eq!(first_not_finite(&[0xff; 64], Dtype::Uint32), None);
    }
}
