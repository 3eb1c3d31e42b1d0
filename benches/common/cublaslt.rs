//! The peer of matrix products: cuBLASLt, opened at run time if installed, with 32 MiB of workspace. The fastest of the
//! algorithms that its heuristic proposes is used, by a few timed runs of each.

use super::libraries;
use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::rc::Rc;
use std::time::Duration;
use swat::backend::cuda::{Cuda, GemmLayout, GemmShape, Precision};
use swat::backend::{Backend, Buffer, FloatElement};

const WORKSPACE_BYTES: usize = 32 << 20;
/// Number of algorithms to time.
const TRIED: usize = 8;
/// Timed runs of an algorithm (the best counts), and calls in each.
const TRIALS: usize = 3;
const CALLS: u32 = 4;

/// cuBLASLt on a device.
pub struct CublasLt<P: Precision> {
    cuda: Cuda<P>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<Cuda<P>, u32>,
}

impl<P: Precision> CublasLt<P> {
    /// Opens the library.
    ///
    /// # Errors
    /// If it is not found (the message says where it was looked for), or does not start.
    pub fn open(cuda: &Cuda<P>) -> Result<Rc<Self>, String> {
        libraries::open("cublasLt")?;
        // SAFETY: it only looks the library up by name; the call above has opened it.
        if !unsafe { sys::is_culib_present() } {
            return Err("found, but not by a name that cudarc opens".into());
        }
        let started = |error| format!("does not start: {error}");
        cuda.stream().map_err(|error| error.to_string())?;
        let handle = lt::create_handle().map_err(|error| started(format!("{error:?}")))?;
        let workspace = cuda.zeros(WORKSPACE_BYTES / 4).map_err(|error| started(error.to_string()))?;
        Ok(Rc::new(Self { cuda: cuda.clone(), handle, workspace }))
    }

    /// C = A·B with the algorithm that is fastest on these tensors; synchronizes the device.
    ///
    /// # Panics
    /// If the library refuses the shape.
    pub fn product<T: FloatElement>(
        self: &Rc<Self>,
        shape: GemmShape,
        a_tensor: &Buffer<Cuda<P>, half::bf16>,
        b_tensor: &Buffer<Cuda<P>, half::bf16>,
        c_tensor: &mut Buffer<Cuda<P>, T>,
    ) -> Product<P> {
        let GemmShape { layout, m, n, k } = shape;
        // cuBLASLt is column-major: row-major C [m, n] = A·B is its Cᵀ [n, m] = Bᵀ·Aᵀ.
        let [transpose_b, transpose_a] = match layout {
            GemmLayout::Tn => [true, false],
            GemmLayout::Nn => [false, false],
            GemmLayout::Nt => [false, true],
        };
        let output = if T::NAME == "f32" { sys::cudaDataType::CUDA_R_32F } else { sys::cudaDataType::CUDA_R_16BF };
        let matrix = |element, transposed: bool, rows: usize, columns: usize| {
            let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
            lt::create_matrix_layout(element, rows as u64, columns as u64, rows as i64).expect("a matrix")
        };
        let b = matrix(sys::cudaDataType::CUDA_R_16BF, transpose_b, n, k);
        let a = matrix(sys::cudaDataType::CUDA_R_16BF, transpose_a, k, m);
        let c = matrix(output, false, n, m);
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F);
        let product = lt::create_matmul_desc(compute, scale).expect("a product");
        let preference = lt::create_matmul_pref().expect("a preference");
        let (which_b, which_a, most) = (
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB,
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        );
        let workspace = WORKSPACE_BYTES;
        let mut found = [MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit(); TRIED];
        let mut count = 0;
        // SAFETY: the descriptors were just made; attributes have the sizes that are passed, and are copied; there is room for
        // TRIED results, of which `count` are written.
        let found = unsafe {
            for (which, transposed) in [(which_b, transpose_b), (which_a, transpose_a)] {
                let operation = i32::from(transposed);
                lt::set_matmul_desc_attribute(product, which, (&raw const operation).cast(), 4).expect("a transpose");
            }
            lt::set_matmul_pref_attribute(preference, most, (&raw const workspace).cast(), 8).expect("a size");
            let results = found.as_mut_ptr().cast();
            let asked = TRIED as i32;
            let told = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                product,
                b,
                a,
                c,
                c,
                preference,
                asked,
                results,
                &mut count,
            );
            lt::destroy_matmul_pref(preference).expect("a preference");
            told.result().unwrap_or_else(|error| panic!("cublaslt refuses {shape:?}: {error:?}"));
            found[..count as usize].iter().map(|result| result.assume_init()).collect::<Vec<_>>()
        };
        let works = sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        let mut made = Product { library: self.clone(), product, matrices: [b, a, c], algorithm: None };
        let mut best = Duration::MAX;
        for result in found.iter().filter(|result| result.state == works) {
            let mut run = || made.queue(&result.algo, a_tensor, b_tensor, c_tensor);
            if run().is_err() {
                continue;
            }
            let calls = || {
                let time = self.cuda.time(|| {
                    (0..CALLS).for_each(|_| run().expect("what ran before"));
                    Ok(())
                });
                time.expect("a working device")
            };
            let time = std::iter::repeat_with(calls).take(TRIALS).min().unwrap_or_default();
            if time < best {
                (best, made.algorithm) = (time, Some(result.algo));
            }
        }
        assert!(made.algorithm.is_some(), "cublaslt has no algorithm for {shape:?}");
        made
    }
}

impl<P: Precision> Drop for CublasLt<P> {
    fn drop(&mut self) {
        // SAFETY: nothing uses the handle any more.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

/// A matrix product of one shape, with its algorithm.
pub struct Product<P: Precision> {
    library: Rc<CublasLt<P>>,
    product: sys::cublasLtMatmulDesc_t,
    matrices: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: Option<sys::cublasLtMatmulAlgo_t>,
}

impl<P: Precision> Product<P> {
    /// Queues C = A·B.
    ///
    /// # Panics
    /// If the library fails.
    pub fn run<T: FloatElement>(
        &self,
        a: &Buffer<Cuda<P>, half::bf16>,
        b: &Buffer<Cuda<P>, half::bf16>,
        c: &mut Buffer<Cuda<P>, T>,
    ) {
        let algorithm = self.algorithm.as_ref().expect("chosen when it was made");
        self.queue(algorithm, a, b, c).expect("cublaslt");
    }

    fn queue<T: FloatElement>(
        &self,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        a: &Buffer<Cuda<P>, half::bf16>,
        b: &Buffer<Cuda<P>, half::bf16>,
        c: &mut Buffer<Cuda<P>, T>,
    ) -> Result<(), CublasError> {
        let CublasLt { cuda, handle, workspace } = &*self.library;
        let stream = cuda.stream().expect("a working device");
        let [map_b, map_a, map_c] = self.matrices;
        let (alpha, beta) = (1f32, 0f32);
        let scalar = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        let (a, b) = (cuda.address(&a.view()) as *const c_void, cuda.address(&b.view()) as *const c_void);
        let (c, space) = (cuda.address(&c.view()) as *mut c_void, cuda.address(&workspace.view()) as *mut c_void);
        let (alpha, beta) = (scalar(&alpha), scalar(&beta));
        let (product, bytes, stream) = (self.product, WORKSPACE_BYTES, stream.cast());
        // SAFETY: the matrices are described as they lie in these buffers; C is borrowed mutably; the workspace is as large
        // as the heuristic was told; scalars are read before the call returns.
        unsafe {
            lt::matmul(
                *handle, product, alpha, beta, b, map_b, a, map_a, c, map_c, c, map_c, algorithm, space, bytes, stream,
            )
        }
    }
}

impl<P: Precision> Drop for Product<P> {
    fn drop(&mut self) {
        // SAFETY: nothing uses the descriptors any more.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.product);
            for matrix in self.matrices {
                let _ = lt::destroy_matrix_layout(matrix);
            }
        }
    }
}
