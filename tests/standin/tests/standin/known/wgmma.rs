//! wgmma, with its operands in every canonical layout.

use super::*;

/// A canonical layout of a wgmma operand of 64 columns of k in shared memory.
struct Operand {
    /// Byte offset of element (row, k), for slabs of these bytes.
    at: fn(usize, usize, usize) -> usize,
    /// Bytes between slabs, of an operand with this many rows.
    slab: fn(usize) -> usize,
    /// Byte offset of step s, of 16 columns of k.
    step: fn(usize, usize) -> usize,
    /// Descriptor for slabs of these bytes.
    descriptor: fn(u64) -> u64,
}

fn fields(leading: u64, stride: u64, swizzle: u64) -> u64 {
    leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62
}

/// k contiguous: rows of 16, 32, 64 or 128 bytes, then the next slab of k.
const K_MAJOR: [Operand; 4] = [
    Operand {
        at: |r, k, slab| k / 8 * slab + r * 16 + k % 8 * 2,
        slab: |rows| rows * 16,
        step: |s, slab| 2 * s * slab,
        descriptor: |slab| fields(slab, 128, 0),
    },
    Operand {
        at: |r, k, slab| k / 16 * slab + swizzled(r * 32 + k % 16 * 2, CU_TENSOR_MAP_SWIZZLE_32B),
        slab: |rows| rows * 32,
        step: |s, slab| s * slab,
        descriptor: |_| fields(0, 256, 3),
    },
    Operand {
        at: |r, k, slab| k / 32 * slab + swizzled(r * 64 + k % 32 * 2, CU_TENSOR_MAP_SWIZZLE_64B),
        slab: |rows| rows * 64,
        step: |s, slab| s / 2 * slab + s % 2 * 32,
        descriptor: |_| fields(0, 512, 2),
    },
    Operand {
        at: |r, k, _| swizzled(r * 128 + k * 2, CU_TENSOR_MAP_SWIZZLE_128B),
        slab: |rows| rows * 128,
        step: |s, _| s * 32,
        descriptor: |_| fields(0, 1024, 1),
    },
];

/// Rows contiguous: a line for each k of 8, 16, 32 or 64 rows, then the next slab of rows.
const ROW_MAJOR: [Operand; 4] = [
    Operand {
        at: |r, k, slab| r / 8 * slab + k * 16 + r % 8 * 2,
        slab: |_| 64 * 16,
        step: |s, _| s * 256,
        descriptor: |slab| fields(128, slab, 0),
    },
    Operand {
        at: |r, k, slab| r / 16 * slab + swizzled(k * 32 + r % 16 * 2, CU_TENSOR_MAP_SWIZZLE_32B),
        slab: |_| 64 * 32,
        step: |s, _| s * 512,
        descriptor: |slab| fields(slab, 256, 3),
    },
    Operand {
        at: |r, k, slab| r / 32 * slab + swizzled(k * 64 + r % 32 * 2, CU_TENSOR_MAP_SWIZZLE_64B),
        slab: |_| 64 * 64,
        step: |s, _| s * 1024,
        descriptor: |slab| fields(slab, 512, 2),
    },
    Operand {
        at: |r, k, slab| r / 64 * slab + swizzled(k * 128 + r % 64 * 2, CU_TENSOR_MAP_SWIZZLE_128B),
        slab: |_| 64 * 128,
        step: |s, _| s * 2048,
        descriptor: |slab| fields(slab, 1024, 1),
    },
];

#[repr(C)]
struct Operands {
    a: u64,
    b: u64,
    a_at: [u32; 4],
    b_at: [u32; 4],
}

/// Writes `rows` × 64 numbers into an image of shared memory, at byte `at`.
fn place_operand(image: &mut [bf16], at: usize, x: &[bf16], rows: usize, layout: &Operand) {
    let slab = (layout.slab)(rows);
    for (r, k) in (0..rows * 64).map(|i| (i / 64, i % 64)) {
        image[(at + (layout.at)(r, k, slab)) / 2] = x[r * 64 + k];
    }
}

const STEPS: [usize; 4] = [0, 1, 2, 3];

#[test]
fn wgmma_multiplies_in_every_canonical_layout() {
    let kernels = [("tn", 128), ("nn", 128), ("nt", 128), ("tt", 128), ("tn", 256), ("nt", 256)];
    for ((name, n), layout) in kernels.iter().flat_map(|kernel| (0..4).map(move |layout| (*kernel, layout))) {
        let (a_layout, b_layout) = match name {
            "tn" => (&K_MAJOR[layout], &K_MAJOR[layout]),
            "nn" => (&K_MAJOR[layout], &ROW_MAJOR[layout]),
            "nt" => (&ROW_MAJOR[layout], &ROW_MAJOR[layout]),
            _ => (&ROW_MAJOR[layout], &K_MAJOR[layout]),
        };
        let (a, b) = (normals(3, 64 * 64), normals(4, n * 64));
        let (a_slab, b_slab) = ((a_layout.slab)(64), (b_layout.slab)(n));
        let (a_bytes, bytes) = (8192, 8192 + n * 128);
        let mut image = vec![bf16::NAN; bytes / 2];
        place_operand(&mut image, 0, &a, 64, a_layout);
        place_operand(&mut image, a_bytes, &b, n, b_layout);
        assert!(image.iter().all(|x| !x.is_nan()), "{name}{n}, layout {layout}: two elements in one swizzled");
        let operands = Operands {
            a: (a_layout.descriptor)(a_slab as u64),
            b: (b_layout.descriptor)(b_slab as u64),
            a_at: STEPS.map(|s| (a_layout.step)(s, a_slab) as u32),
            b_at: STEPS.map(|s| (a_bytes + (b_layout.step)(s, b_slab)) as u32),
        };
        for ordinal in HOPPERS {
            let Some(gpu) = Gpu::hopper(ordinal) else { return };
            let (from, to, bytes) = (gpu.put(&image), gpu.put(&vec![0f32; 64 * n]), bytes as u32);
            let function = gpu.function("known_sm90", &format!("known_wgmma{n}_{name}"));
            let arguments = &mut [arg(&from), arg(&bytes), arg(&operands), arg(&to)];
            gpu.run(function, [1; 3], [128, 1, 1], bytes, arguments);
            let expected = product_of_cores(&a, &b, [64, n, 64], ordinal);
            assert!(gpu.get::<f32>(to, 64 * n) == expected, "wgmma{n} {name}, layout {layout}, device {ordinal}");
        }
    }
}

#[test]
fn wgmma_takes_an_operand_from_registers() {
    let kernels = [("t", 64, &K_MAJOR), ("n", 64, &ROW_MAJOR), ("t", 128, &K_MAJOR), ("n", 128, &ROW_MAJOR)];
    for ((name, n, layouts), layout) in kernels.iter().flat_map(|kernel| (0..4).map(move |layout| (*kernel, layout))) {
        let layout = &layouts[layout];
        let (a, b, slab) = (normals(5, 64 * 64), normals(6, n * 64), (layout.slab)(n));
        let mut image = vec![bf16::NAN; n * 64];
        place_operand(&mut image, 0, &b, n, layout);
        let b_at = STEPS.map(|s| (layout.step)(s, slab) as u32);
        let operands = Operands { a: 0, b: (layout.descriptor)(slab as u64), a_at: [0; 4], b_at };
        for ordinal in HOPPERS {
            let Some(gpu) = Gpu::hopper(ordinal) else { return };
            let (pa, pb, pd) = (gpu.put(&a), gpu.put(&image), gpu.put(&vec![0f32; 64 * n]));
            let function = gpu.function("known_sm90", &format!("known_registers{n}_{name}"));
            let bytes = (n * 128) as u32;
            let arguments = &mut [arg(&pa), arg(&pb), arg(&bytes), arg(&operands), arg(&pd)];
            gpu.run(function, [1; 3], [128, 1, 1], bytes, arguments);
            let expected = product_of_cores(&a, &b, [64, n, 64], ordinal);
            assert!(gpu.get::<f32>(pd, 64 * n) == expected, "registers{n} {name}, device {ordinal}");
        }
    }
}
