//! Instructions with known answers, on every device that has them.

mod wgmma;

use super::*;
use half::bf16;
use standin::Compiler;
use standin::cores::{AMPERE, HOPPER};
use sys::CUtensorMapSwizzle::{self, *};

/// The image of a file of kernels for a real GPU: from the folder `SWAT_KNOWN_IMAGES`, else compiled now.
pub(super) fn compiled(stem: &str) -> Vec<u8> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| given_folder().unwrap_or_else(compile));
    let image = folder.join(stem).with_extension("fatbin");
    std::fs::read(&image).unwrap_or_else(|error| panic!("{}: {error}", image.display()))
}

fn given_folder() -> Option<PathBuf> {
    std::env::var_os("SWAT_KNOWN_IMAGES").map(PathBuf::from)
}

/// Compiles the files with known answers, into `SWAT_KNOWN_IMAGES` or a folder of this build.
fn compile() -> PathBuf {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = given_folder().unwrap_or_else(|| scratch.join("known"));
    std::fs::create_dir_all(&folder).unwrap();
    let compiler = Compiler::find(scratch).unwrap();
    for (stem, code) in COMPILED {
        let arguments = ["-O3", "-std=c++17", "-fatbin", "-no-compress", "-gencode", code];
        compiler.nvcc(&arguments, &kernel_file(stem), &folder.join(stem).with_extension("fatbin"));
    }
    folder
}

/// Files, and the code they are compiled to.
const COMPILED: [(&str, &str); 2] =
    [("known", "arch=compute_80,code=[sm_80,compute_80]"), ("known_sm90", "arch=compute_90a,code=sm_90a")];

/// Every kernel with a known answer is in its file's image; `scripts/gpu_pack.sh` takes the images from here.
#[test]
fn nvcc_compiles_them() {
    if standin::real() || standin::compiled() || standin::nvcc().is_none() {
        return;
    }
    let folder = compile();
    for (stem, _) in COMPILED {
        let source = std::fs::read_to_string(kernel_file(stem)).unwrap();
        let image = std::fs::read(folder.join(stem).with_extension("fatbin")).unwrap();
        let named = |line: &str| {
            let parts = |prefix: &str| line.strip_prefix(prefix)?.split(')').next().map(|parts| parts.split(", "));
            let of = |what: &str, mut parts: std::str::Split<&str>| {
                let (name, n) = (parts.next()?, parts.next()?);
                Some(format!("known_{what}{n}_{name}"))
            };
            (parts("EXPORT(").and_then(|mut parts| parts.next()).map(String::from))
                .or_else(|| of("wgmma", parts("PRODUCT(")?))
                .or_else(|| of("registers", parts("PRODUCT_OF_REGISTERS(")?))
        };
        let kernels: Vec<String> = source.lines().filter_map(named).collect();
        for kernel in &kernels {
            assert!(image.windows(kernel.len()).any(|part| part == kernel.as_bytes()), "{kernel} is not in {stem}");
        }
        assert!(kernels.len() >= 7, "{stem}: {kernels:?}");
    }
}

/// Numbers around 0 with a variance of 1, the same for the same seed: sums of twelve uniform ones.
fn normals(seed: u64, len: usize) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    (0..len).map(|_| bf16::from_f64((0..12).map(|_| uniform()).sum::<f64>() - 6.0)).collect()
}

/// Rows of `a` (m × k) times rows of `b` (n × k), summed as on the tensor cores of a device.
fn product_of_cores(a: &[bf16], b: &[bf16], [m, n, k]: [usize; 3], ordinal: i32) -> Vec<f32> {
    let [a, b] = [a, b].map(|x| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
    let cores = if HOPPERS.contains(&ordinal) { HOPPER } else { AMPERE };
    (0..m * n).map(|at| cores.dot(&a[at / n * k..][..k], &b[at % n * k..][..k])).collect()
}

/// Next to a large term, small ones are truncated to the bits that are kept below its exponent.
#[test]
fn tensor_cores_truncate() {
    let small = 2f32.powi(-25);
    let sums =
        |first: f32, four: f32| [HOPPER, AMPERE].map(|cores| cores.dot(&[1.0; 5], &[first, four, four, four, four]));
    assert_eq!(sums(1.0, small), [1.0 + 4.0 * small, 1.0]);
    assert_eq!(sums(1.0, 1.5 * small), [1.0 + 4.0 * small, 1.0]);
    assert_eq!(sums(1.0, 2.0 * small), [1.0 + 8.0 * small; 2]);
    assert_eq!(sums(1.0, -small), [1.0 - 4.0 * small, 1.0]);
    assert_eq!(sums(-1.0, -small), [-1.0 - 4.0 * small, -1.0]);
    assert_eq!(sums(-1.0, -0.5 * small), [-1.0; 2]);
}

#[test]
fn bf16_rounds_to_nearest_even() {
    let mut x: Vec<f32> =
        [0, 1, 0x7f80_0000, 0x7f80_0001, 0x7fff_ffff, 0x7f7f_ffff, 0x7f7f_8000, 0x7f7f_7fff, 0x8000_0000]
            .map(f32::from_bits)
            .to_vec();
    for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
        x.extend((0..512).map(|i| f32::from_bits(u32::wrapping_mul(i, 0x0081_0000) ^ low)));
    }
    for ordinal in DEVICES {
        let Some(gpu) = Gpu::any(ordinal) else { return };
        let (from, to) = (gpu.put(&x), gpu.put(&vec![0u16; x.len()]));
        let n = x.len() as u32;
        let rounding = gpu.function("known", "known_rounding");
        gpu.run(rounding, [1; 3], [32, 1, 1], 0, &mut [arg(&from), arg(&to), arg(&n)]);
        for (x, got) in x.iter().zip(gpu.get::<u16>(to, x.len())) {
            let expected = if x.is_nan() { 0x7fff } else { bf16::from_f32(*x).to_bits() };
            assert_eq!(got, expected, "{x:e} ({:#x})", x.to_bits());
        }
    }
}

#[test]
fn mma_multiplies() {
    for ordinal in DEVICES {
        let Some(gpu) = Gpu::any(ordinal) else { return };
        let (a, b) = (normals(1, 256), normals(2, 128));
        let (pa, pb, pd) = (gpu.put(&a), gpu.put(&b), gpu.put(&[0f32; 128]));
        gpu.run(gpu.function("known", "known_mma"), [1; 3], [32, 1, 1], 0, &mut [arg(&pa), arg(&pb), arg(&pd)]);
        // Half of the same product twice.
        let (a, b): (Vec<bf16>, Vec<bf16>) =
            ((0..512).map(|i| a[i / 32 * 16 + i % 16]).collect(), (0..256).map(|i| b[i % 16 * 8 + i / 32]).collect());
        let twice = product_of_cores(&a, &b, [16, 8, 32], ordinal);
        assert_eq!(gpu.get::<f32>(pd, 128), twice.iter().map(|x| 0.5 * x).collect::<Vec<_>>());
    }
}

#[test]
fn ldmatrix_distributes_pairs() {
    for (kernel, transposed) in [("known_ldmatrix", false), ("known_ldmatrix_trans", true)] {
        for ordinal in DEVICES {
            let Some(gpu) = Gpu::any(ordinal) else { return };
            let x: Vec<u16> = (0..256).collect();
            let (from, to) = (gpu.put(&x), gpu.put(&[0u32; 128]));
            gpu.run(gpu.function("known", kernel), [1; 3], [32, 1, 1], 512, &mut [arg(&from), arg(&to)]);
            let expected: Vec<u32> = (0..128)
                .map(|at| {
                    let (matrix, row, pair) = (at / 32, at % 32 / 4, at % 4);
                    let element = |e: u32| {
                        let (i, j) = if transposed { (2 * pair + e, row) } else { (row, 2 * pair + e) };
                        matrix * 64 + i * 8 + j
                    };
                    element(0) | element(1) << 16
                })
                .collect();
            assert_eq!(gpu.get::<u32>(to, 128), expected, "{kernel}");
        }
    }
}

#[test]
fn shuffles_and_votes() {
    for ordinal in DEVICES {
        let Some(gpu) = Gpu::any(ordinal) else { return };
        let to = gpu.put(&[0i32; 9 * 64]);
        gpu.run(gpu.function("known", "known_shuffles"), [1; 3], [64, 1, 1], 0, &mut [arg(&to)]);
        let got = gpu.get::<i32>(to, 9 * 64);
        for rank in 0..64i32 {
            let (warp, lane) = (rank / 32 * 32, rank % 32);
            let votes = (0..32).filter(|l| (warp + l) % 3 == 0).fold(0u32, |bits, l| bits | 1 << l);
            let expected = [
                warp + (lane ^ 5),
                if lane + 3 < 32 { rank + 3 } else { rank },
                if lane >= 3 { rank - 3 } else { rank },
                warp + 7,
                if lane % 8 + 3 < 8 { rank + 3 } else { rank },
                if lane % 8 >= 3 { rank - 3 } else { rank },
                rank / 8 * 8 + 7,
                votes as i32,
                if warp == 32 { 2 } else { 1 },
            ];
            for (i, expected) in expected.iter().enumerate() {
                assert_eq!(got[i * 64 + rank as usize], *expected, "number {i} of thread {rank}");
            }
        }
    }
}

#[test]
fn every_thread_of_every_block_runs_once() {
    let (grid, block) = ([3u32, 4, 2], [5u32, 3, 7]);
    let (blocks, threads) = (grid.iter().product::<u32>(), block.iter().product::<u32>());
    for ordinal in DEVICES {
        let Some(gpu) = Gpu::any(ordinal) else { return };
        let to = gpu.put(&vec![0u32; (blocks * threads * 4) as usize]);
        gpu.run(gpu.function("known", "known_places"), grid, block, 0, &mut [arg(&to)]);
        let got = gpu.get::<u32>(to, (blocks * threads * 4) as usize);
        let swizzled = |n: u32, [x, y, _]: [u32; 3]| [n % x, n / x % y, n / (x * y)];
        for i in 0..blocks * threads {
            let (b, t) = (swizzled(i / threads, grid), swizzled(i % threads, block));
            let expected = [b[0] + 256 * t[0], b[1] + 256 * t[1], b[2] + 256 * t[2], 1];
            assert_eq!(got[4 * i as usize..][..4], expected);
        }
        let sums = gpu.put(&[0u32; 3]);
        gpu.run(gpu.function("known", "known_atomics"), [10, 1, 1], [128, 1, 1], 0, &mut [arg(&sums)]);
        assert_eq!(gpu.get::<u32>(sums, 3), [10 * 127 * 64, 10, 1279]);
    }
}

#[test]
fn parameters_are_laid_out_as_on_the_device() {
    let Some(gpu) = Gpu::any(0) else { return };
    let function = gpu.function("known", "known_parameters");
    let layout: Vec<(usize, usize)> = (0..)
        .map_while(|index| {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: writes two integers.
            let found = unsafe { sys::cuFuncGetParamInfo(function, index, &mut offset, &mut size) };
            found.result().ok().map(|()| (offset, size))
        })
        .collect();
    assert_eq!(layout, [(0, 1), (8, 8), (16, 2), (24, 16), (40, 8), (48, 1)]);
    #[repr(C)]
    struct Mixed(u64, u8);
    let y = gpu.put(&[0f32; 6]);
    let (a, b, c, d, e) = (200u8, 0.5f64, 40_000u16, Mixed(1 << 40, 9), -3i8);
    gpu.run(function, [1; 3], [32, 1, 1], 0, &mut [arg(&a), arg(&b), arg(&c), arg(&d), arg(&y), arg(&e)]);
    assert_eq!(gpu.get::<f32>(y, 6), [200.0, 0.5, 40_000.0, (1u64 << 40) as f32, 9.0, -3.0]);
}

#[test]
fn mbarrier_phases_order_accesses() {
    for ordinal in HOPPERS {
        let Some(gpu) = Gpu::hopper(ordinal) else { return };
        let (rounds, y) = (9u32, gpu.put(&[0u32; 128]));
        gpu.run(gpu.function("known_sm90", "known_phases"), [1; 3], [128, 1, 1], 0, &mut [arg(&rounds), arg(&y)]);
        let (mut number, mut sum) = (1u32, 0u32);
        for round in 0..rounds {
            number = number * 3 + round;
            sum += number;
        }
        let got = gpu.get::<u32>(y, 128);
        assert_eq!(got[..64], [0; 64]);
        assert_eq!(got[64..], [sum; 64]);
    }
}

/// Address of byte `offset` of unswizzled lines: the index of a 16-byte chunk within its line of 128 bytes xor the
/// line's number (modulo 8, 4 or 2).
fn swizzled(offset: usize, swizzle: CUtensorMapSwizzle) -> usize {
    let (line, in_line) = (offset / 128, offset % 128);
    let moved = match swizzle {
        CU_TENSOR_MAP_SWIZZLE_128B => line % 8,
        CU_TENSOR_MAP_SWIZZLE_64B => line % 4,
        CU_TENSOR_MAP_SWIZZLE_32B => line % 2,
        _ => 0,
    };
    line * 128 + ((in_line / 16) ^ moved) * 16 + in_line % 16
}

const SWIZZLES: [(CUtensorMapSwizzle, usize); 4] = [
    (CU_TENSOR_MAP_SWIZZLE_NONE, 96),
    (CU_TENSOR_MAP_SWIZZLE_32B, 32),
    (CU_TENSOR_MAP_SWIZZLE_64B, 64),
    (CU_TENSOR_MAP_SWIZZLE_128B, 128),
];

#[test]
fn tma_loads_swizzle_and_zero_fill() {
    // 30 rows of 72 numbers, 80 apart.
    let x: Vec<bf16> = (0..30 * 80).map(|i| bf16::from_bits(i as u16 + 1)).collect();
    for (swizzle, line) in SWIZZLES {
        for (x0, x1) in [(0, 0), (8, 16), (-5, -3), (60, 20), (200, 0)] {
            for ordinal in HOPPERS {
                let Some(gpu) = Gpu::hopper(ordinal) else { return };
                let (rows, columns, bytes) = (24usize, line / 2, 24 * line as u32);
                let (from, to) = (gpu.put(&x), gpu.put(&vec![0u16; rows * columns]));
                let map = tensor_map::<bf16>(from, &[72, 30], 160, &[columns as u32, rows as u32], swizzle).unwrap();
                let known_box = gpu.function("known_sm90", "known_box");
                let arguments = &mut [arg(&map), arg(&x0), arg(&x1), arg(&bytes), arg(&to)];
                gpu.run(known_box, [1; 3], [128, 1, 1], bytes, arguments);
                let got = gpu.get::<u16>(to, rows * columns);
                for (at, (row, column)) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))).enumerate() {
                    let (r, c) = (row as i32 + x1, column as i32 + x0);
                    let inside = (0..30).contains(&r) && (0..72).contains(&c);
                    let expected = if inside { x[(r * 80 + c) as usize].to_bits() } else { 0 };
                    assert_eq!(
                        got[swizzled(2 * at, swizzle) / 2],
                        expected,
                        "{line} bytes at {x0}, {x1}: {row}, {column}"
                    );
                }
            }
        }
    }
}

#[test]
fn tma_loads_of_three_dimensions() {
    let x: Vec<f32> = (0..5 * 6 * 16).map(|i| i as f32 + 1.0).collect();
    for ordinal in HOPPERS {
        let Some(gpu) = Gpu::hopper(ordinal) else { return };
        let (x0, x1, x2, bytes) = (4i32, 5i32, 3i32, 8 * 2 * 3 * 4u32);
        let (from, to) = (gpu.put(&x), gpu.put(&[0f32; 48]));
        let map = tensor_map::<f32>(from, &[16, 6, 5], 64, &[8, 2, 3], CU_TENSOR_MAP_SWIZZLE_NONE).unwrap();
        let function = gpu.function("known_sm90", "known_box_3d");
        let arguments = &mut [arg(&map), arg(&x0), arg(&x1), arg(&x2), arg(&bytes), arg(&to)];
        gpu.run(function, [1; 3], [128, 1, 1], bytes, arguments);
        let got = gpu.get::<f32>(to, 48);
        for (at, got) in got.iter().enumerate() {
            let (column, row, plane) = (4 + at % 8, 5 + at / 8 % 2, 3 + at / 16);
            let expected = if row < 6 && plane < 5 { x[(plane * 6 + row) * 16 + column] } else { 0.0 };
            assert_eq!(*got, expected);
        }
    }
}

#[test]
fn tma_stores_clip() {
    let x: Vec<u16> = (1..=16 * 64).collect();
    for ordinal in HOPPERS {
        let Some(gpu) = Gpu::hopper(ordinal) else { return };
        let (from, to) = (gpu.put(&x), gpu.put(&[0u16; 2 * 20 * 88]));
        let map = tensor_map::<bf16>(to, &[80, 20, 2], 176, &[64, 16, 1], CU_TENSOR_MAP_SWIZZLE_128B).unwrap();
        let (x0, x1, x2, bytes, adds) = (24i32, 8i32, 1i32, 2048u32, 0u32);
        let function = gpu.function("known_sm90", "known_store");
        let arguments = &mut [arg(&map), arg(&x0), arg(&x1), arg(&x2), arg(&bytes), arg(&adds), arg(&from)];
        gpu.run(function, [1; 3], [128, 1, 1], bytes, arguments);
        let got = gpu.get::<u16>(to, 2 * 20 * 88);
        assert_eq!(got[..20 * 88], [0; 20 * 88]);
        for (at, got) in got[20 * 88..].iter().enumerate() {
            let (row, column) = ((at / 88) as i32 - x1, (at % 88) as i32 - x0);
            let inside = (0..12).contains(&row) && (0..56).contains(&column);
            let expected =
                if inside { x[swizzled((row * 128 + 2 * column) as usize, CU_TENSOR_MAP_SWIZZLE_128B) / 2] } else { 0 };
            assert_eq!(*got, expected, "{row}, {column}");
        }
    }
}

#[test]
fn tma_reductions_clip() {
    let x: Vec<f32> = (0..16 * 32).map(|i| i as f32 + 0.25).collect();
    let before: Vec<f32> = (0..20 * 40).map(|i| 1.5 - i as f32).collect();
    for ordinal in HOPPERS {
        let Some(gpu) = Gpu::hopper(ordinal) else { return };
        let (from, to) = (gpu.put(&x), gpu.put(&before));
        let map = tensor_map::<f32>(to, &[36, 20, 1], 160, &[32, 16, 1], CU_TENSOR_MAP_SWIZZLE_128B).unwrap();
        let (x0, x1, x2, bytes, adds) = (8i32, 10i32, 0i32, 2048u32, 1u32);
        let function = gpu.function("known_sm90", "known_store");
        let arguments = &mut [arg(&map), arg(&x0), arg(&x1), arg(&x2), arg(&bytes), arg(&adds), arg(&from)];
        gpu.run(function, [1; 3], [128, 1, 1], bytes, arguments);
        for (at, got) in gpu.get::<f32>(to, 20 * 40).iter().enumerate() {
            let (row, column) = ((at / 40) as i32 - x1, (at % 40) as i32 - x0);
            let inside = (0..10).contains(&row) && (0..28).contains(&column);
            let offset = swizzled((row * 128 + 4 * column) as usize % 2048, CU_TENSOR_MAP_SWIZZLE_128B);
            assert_eq!(*got, before[at] + if inside { x[offset / 4] } else { 0.0 }, "{row}, {column}");
        }
    }
}

#[test]
fn stmatrix_collects_pairs() {
    for ordinal in HOPPERS {
        let Some(gpu) = Gpu::hopper(ordinal) else { return };
        let to = gpu.put(&[0u32; 128]);
        gpu.run(gpu.function("known_sm90", "known_stmatrix"), [1; 3], [32, 1, 1], 512, &mut [arg(&to)]);
        // Pair p of row r of matrix m is register m of lane 4·r + p.
        let expected: Vec<u32> = (0..128).map(|at| at % 32 * 4 + at / 32).collect();
        assert_eq!(gpu.get::<u32>(to, 128), expected);
    }
}
